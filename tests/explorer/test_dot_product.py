"""The dot-product explorer: its numbers are the package's, and everything moves by mouse, finger and keyboard."""

import math
import re

import pytest
import torch

from attnlab.errors import ConfigError, InputError, ShapeError
from attnlab.explorer import DotProductExplorer
from attnlab.explorer.dot_product import DIMS, REACH

HANDLE = ".dot-handle"


def shown(page) -> dict:
    """What stands in the table."""
    rows = page.locator("tbody tr").evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.innerText))")
    columns = [
        [float(cell.replace("−", "-").replace(",", "")) for cell in column] for column in zip(*rows, strict=True)
    ]
    output = float(re.search(r"= (.*)", page.inner_text("tfoot"))[1].replace("−", "-").replace(",", ""))
    return {"scores": columns[2], "scaled": columns[3], "weights": columns[4], "output": [output]}


def agrees(page, explorer, query, d_k, divide) -> None:
    """The table equals, to the digits shown, what attention gives on vectors of all d_k coordinates."""
    right = explorer.numbers(query, d_k, divide)
    for name, numbers in shown(page).items():
        half = 0.0006 if name == "weights" else 0.006
        assert numbers == pytest.approx(right[name].tolist(), abs=half), (name, query, d_k, divide)


def query_of(page) -> list[float]:
    return [
        float(part.replace("−", "-")) for part in re.findall(r"−?[\d.]+", page.get_attribute(HANDLE, "aria-valuetext"))
    ]


def at(page, x, y) -> dict:
    """Where a point of the plane lies on the screen."""
    box = page.locator(".dot-plane").bounding_box()
    return {
        "x": box["x"] + (x + REACH) / (2 * REACH) * box["width"],
        "y": box["y"] + (REACH - y) / (2 * REACH) * box["height"],
    }


# ---- in Python


def test_the_planes_dot_product_is_the_whole_one():
    made = DotProductExplorer(seed=3)
    for d_k in DIMS:
        for query in ([1.5, 1.0], [-0.3, 2.0]):
            q = torch.tensor(query, dtype=torch.float64)
            assert torch.allclose(made.arrows(d_k) @ q, made.numbers(query, d_k)["scores"])


def test_at_two_coordinates_the_arrows_are_the_keys_that_were_given():
    keys = [[0.5, -1.0], [2.0, 1.0]]
    made = DotProductExplorer(keys, [1, 2])
    assert made.arrows(2).tolist() == keys
    assert made.key_vectors(1024).shape == (2, 1024)
    assert torch.equal(made.key_vectors(1024)[:, :64], made.key_vectors(64))


def test_scores_spread_by_the_root_of_d_k_and_scaled_ones_do_not():
    query = (1.0, 1.0)  # mean square 1
    for d_k in (16, 256, 1024):
        drawn = [DotProductExplorer([[0, 0]] * 12, [0] * 12, seed=seed).numbers(query, d_k) for seed in range(100)]
        spread = torch.stack([numbers["scores"] for numbers in drawn]).std().item()
        assert spread == pytest.approx(math.sqrt(d_k - 2), rel=0.1)  # of random coordinates there are d_k - 2
        assert torch.stack([numbers["scaled"] for numbers in drawn]).std().item() == pytest.approx(1, abs=0.15)


def test_it_stands_on_the_chapters_own_tensors():
    made = DotProductExplorer(torch.tensor([[2.0, 0.0]]), torch.tensor([[10.0]]), torch.tensor([[1.5, 1.0]]))
    assert made.data["query"] == [1.5, 1.0] and made.data["values"] == [10.0]
    assert made.numbers(torch.tensor([[1.5, 1.0]]), 2)["output"].tolist() == [10.0]


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"keys": [[1, 2, 3]]}, ShapeError, r"keys \(S, 2\)"),
        ({"keys": []}, ShapeError, r"keys \(S, 2\)"),
        ({"keys": [[0, 0]] * 13, "values": [0] * 13}, ShapeError, "from 1 to 12"),
        ({"values": [1, 2]}, ShapeError, "a value for each"),
        ({"query": [1]}, ShapeError, "a query of 2"),
        ({"keys": [[float("nan"), 0]] * 3}, InputError, "keys must be finite"),
        ({"query": [4, 0]}, InputError, "from -3 to 3"),
        ({"values": [1, 2, float("inf")]}, InputError, "values must be finite"),
        ({"d_k": 3}, ConfigError, "d_k must be one of 2, 4"),
    ],
)
def test_bad_input_is_refused_in_words(options, error, words):
    with pytest.raises(error, match=words):
        DotProductExplorer(**options)


def test_the_still_picture_is_drawn_at_every_setting():
    for d_k, divide in ((2, True), (1024, False)):
        made = DotProductExplorer(d_k=d_k, divide=divide)
        assert len(made.still().axes) == 2 and len(made.alt) > 40


# ---- in the browser


@pytest.mark.browser
def test_every_d_k_and_both_settings_equal_the_package(opened):
    made = DotProductExplorer(seed=1)
    page = opened(made).page
    page.focus("input[type=range]")
    for d_k in DIMS:
        assert page.get_attribute("input[type=range]", "aria-valuetext") == f"{d_k:,}"
        for divide in (True, False):
            page.set_checked("input[type=checkbox]", divide)
            agrees(page, made, [1.5, 1.0], d_k, divide)
        page.focus("input[type=range]")
        page.keyboard.press("ArrowRight")


@pytest.mark.browser
def test_the_mouse_drags_the_query_and_a_click_moves_it(opened):
    made = DotProductExplorer()
    page = opened(made).page
    start, goal = at(page, 1.5, 1.0), at(page, -1.0, -2.0)
    page.mouse.move(**start)
    page.mouse.down()
    page.mouse.move(**at(page, 0, 0), steps=3)
    page.mouse.move(**goal, steps=3)
    assert query_of(page) == pytest.approx([-1.0, -2.0], abs=0.03)
    page.mouse.move(-50, -50)  # beyond the plane: it stays in it
    assert query_of(page) == [-REACH, REACH]
    page.mouse.up()
    page.mouse.move(**at(page, 1, 1))
    assert query_of(page) == [-REACH, REACH]  # let go
    page.mouse.click(**at(page, 2.0, 0.5))
    assert query_of(page) == pytest.approx([2.0, 0.5], abs=0.03)
    agrees(page, made, query_of(page), 2, True)


@pytest.mark.browser
def test_a_finger_drags_the_query_by_its_handle_and_taps_it_elsewhere(opened):
    made = DotProductExplorer()
    page = opened(made, width=320, has_touch=True).page
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    touch("touchStart", at(page, 1.5, 1.0))
    for x in (1.0, 0.0, -1.0):
        touch("touchMove", at(page, x, 1.0))
    touch("touchEnd")
    assert query_of(page) == pytest.approx([-1.0, 1.0], abs=0.05)
    agrees(page, made, query_of(page), 2, True)
    page.touchscreen.tap(**at(page, 1.0, -1.0))
    assert query_of(page) == pytest.approx([1.0, -1.0], abs=0.05)


@pytest.mark.browser
def test_the_keyboard_reaches_everything_and_the_focus_is_seen(opened):
    made = DotProductExplorer()
    page = opened(made).page
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.getAttribute('class') ?? document.activeElement.tagName + (document.activeElement.type ?? '')"
            )
        )
    assert reached == ["INPUTrange", "INPUTcheckbox", "dot-handle", "x-scroll", "SUMMARY"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.querySelector('.dot-handle .dot-grip')).strokeWidth") == "3px"
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "Shift+ArrowDown", "Shift+ArrowRight"):
        page.keyboard.press(key)
    assert query_of(page) == pytest.approx([1.8, 0.6])
    agrees(page, made, query_of(page), 2, True)
    page.wait_for_function("document.querySelector('[role=status]').textContent.includes('1.80, 0.60')")
    assert page.evaluate("scrollY") == 0  # the arrows moved the query, not the page
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    assert query_of(page)[0] == REACH


@pytest.mark.browser
def test_without_the_division_one_key_takes_all(opened):
    """The lesson of the chapter: at 1,024 coordinates the undivided softmax answers with one value."""
    made = DotProductExplorer(d_k=1024, divide=False)
    page = opened(made).page
    sharp = shown(page)
    page.set_checked("input[type=checkbox]", True)
    soft = shown(page)
    assert max(sharp["weights"]) > 0.99 > 0.95 > max(soft["weights"])
    assert sharp["output"][0] == pytest.approx(
        made.values[sharp["weights"].index(max(sharp["weights"]))].item(), abs=0.3
    )


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 320])
def test_it_fits_is_accessible_and_its_targets_are_large(opened, width, theme):
    seen = opened(DotProductExplorer([[1, 1]] * 12, range(12), d_k=1024, divide=False), width=width, theme=theme)
    assert not seen.wider_than_the_screen()
    seen.page.click("summary")
    assert seen.violations() == []
    for target in seen.page.locator("input, button, select, summary, .dot-grip").all():
        box = target.bounding_box()
        assert min(box["width"], box["height"]) >= 24, target
    assert seen.complaints == []
