"""rotary.py: what a rotation must keep, and both layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.errors import ConfigError, ShapeError
from attnlab.rotary import apply_rotary, halves_to_interleaved, interleaved_to_halves, rotary_angles, wavelengths


def rotated(x, position, theta=1e4, layout="halves"):
    return apply_rotary(x[None, None, None], *rotary_angles(torch.tensor([position]), x.shape[0], theta), layout)[
        0, 0, 0
    ]


@settings(deadline=None, max_examples=50)
@given(
    m=st.integers(0, 5000), n=st.integers(0, 5000), shift=st.integers(0, 5000), half=st.integers(1, 16),
    theta=st.sampled_from([1e4, 1e6]), layout=st.sampled_from(["halves", "interleaved"]),
)  # fmt: skip
def test_scores_depend_on_the_difference_of_positions_and_norms_stay(m, n, shift, half, theta, layout):
    g = torch.Generator().manual_seed(half)
    q, k = (torch.randn(2 * half, generator=g) for _ in range(2))
    here = rotated(q, m, theta, layout) @ rotated(k, n, theta, layout)
    there = rotated(q, m + shift, theta, layout) @ rotated(k, n + shift, theta, layout)
    scale = float(q.norm() * k.norm())
    assert abs(float(here - there)) < 4e-3 * scale  # angles of thousands in float32 are good to about 1e-3
    torch.testing.assert_close(rotated(q, m, theta, layout).norm(), q.norm())


def test_position_zero_changes_nothing():
    x = torch.arange(8.0)
    assert torch.equal(rotated(x, 0), x)


def test_worked_example_of_a_quarter_turn():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None, None]
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    assert apply_rotary(x, cos, sin).flatten().tolist() == [-3, -4, 1, 2]
    assert apply_rotary(x, cos, sin, "interleaved").flatten().tolist() == [-2, 1, -4, 3]


def test_the_permutation_carries_one_layout_into_the_other():
    g = torch.Generator().manual_seed(0)
    n_heads, head_dim, d_model = 3, 8, 10
    weight = torch.randn(n_heads * head_dim, d_model, generator=g)  # made for interleaved pairs
    x = torch.randn(5, d_model, generator=g)
    angles = rotary_angles(torch.arange(5), head_dim)

    def project(w, layout):
        heads = (x @ w.T).view(5, n_heads, head_dim).transpose(0, 1)[None]
        return apply_rotary(heads, *angles, layout)

    one, other = project(weight, "interleaved"), project(interleaved_to_halves(weight, n_heads), "halves")
    torch.testing.assert_close(one @ one.mT, other @ other.mT)
    mixed = project(weight, "halves")  # the silent failure: same shapes, wrong scores
    assert (one @ one.mT - mixed @ mixed.mT).abs().max() > 0.1
    assert torch.equal(halves_to_interleaved(interleaved_to_halves(weight, n_heads), n_heads), weight)


def test_rows_may_stand_at_different_positions():
    x = torch.randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    both = apply_rotary(x, *rotary_angles(positions, 8))
    for row in range(2):
        torch.testing.assert_close(
            both[row : row + 1], apply_rotary(x[row : row + 1], *rotary_angles(positions[row], 8))
        )


@pytest.mark.parametrize("theta", [1e2, 1e4, 1e6])
def test_after_a_wavelength_a_pair_is_back_where_it_began(theta):
    for i, wavelength in enumerate(wavelengths(8, theta)):
        for turn, cos_there in ((0.5, -1.0), (1.0, 1.0)):
            cos, sin = rotary_angles(turn * wavelength[None], 8, theta)
            torch.testing.assert_close(cos[0, i].item(), cos_there, atol=1e-4, rtol=0)
            assert abs(sin[0, i]) < 1e-3


def test_a_larger_theta_slows_every_pair_but_the_first():
    slow, fast = wavelengths(128, 1e6), wavelengths(128, 1e4)
    assert slow[0] == fast[0] and (slow[1:] > fast[1:]).all()
    torch.testing.assert_close(slow / fast, 100 ** (torch.arange(64, dtype=torch.double) / 64))


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="even"):
        rotary_angles(torch.arange(3), 7)
    with pytest.raises(ConfigError, match="even"):
        wavelengths(7)
    with pytest.raises(ConfigError, match="positive"):
        rotary_angles(torch.arange(3), 8, theta=0)
    with pytest.raises(ShapeError, match="expected cos"):
        apply_rotary(torch.zeros(1, 1, 3, 8), *rotary_angles(torch.arange(4), 8))
    with pytest.raises(ConfigError, match="layout"):
        apply_rotary(torch.zeros(1, 1, 3, 8), *rotary_angles(torch.arange(3), 8), layout="pairs")
    with pytest.raises(ShapeError, match="even size"):
        interleaved_to_halves(torch.zeros(10, 4), 3)
