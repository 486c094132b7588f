"""What a Sampler draws, against probabilities worked out by hand."""

import math

import pytest
import torch

from attnlab.errors import ConfigError, ShapeError
from attnlab.sampling import Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def frequencies(n=4000, **how):
    sampler = Sampler(seed=0, **how)
    return torch.bincount(torch.tensor([sampler(LOGITS) for _ in range(n)]), minlength=4) / n


def test_temperature_and_top_p_draw_from_the_right_distribution():
    assert torch.allclose(frequencies(temperature=1.0), LOGITS.softmax(-1), atol=0.03)
    assert torch.allclose(frequencies(temperature=2.0), (LOGITS / 2).softmax(-1), atol=0.03)
    # 0.644 + 0.237 reach 0.8: two are left, in proportion
    assert torch.allclose(frequencies(temperature=1.0, top_p=0.8), torch.tensor([0.731, 0.269, 0, 0]), atol=0.03)
    assert frequencies(50, temperature=1.0, top_p=0.6).tolist() == [1, 0, 0, 0]  # the likeliest is always kept
    for tiny in (1e-30, 1e-126, 5e-324):  # the latter two are 0 in float32
        assert frequencies(50, temperature=tiny).tolist() == [1, 0, 0, 0]
    assert frequencies(50).tolist() == [1, 0, 0, 0]


def test_top_k_leaves_the_k_likeliest_in_proportion():
    two = torch.cat([LOGITS[:2].softmax(-1), torch.zeros(2)])
    assert torch.allclose(frequencies(temperature=1.0, top_k=2), two, atol=0.03)
    assert torch.allclose(frequencies(temperature=1.0, top_k=50), LOGITS.softmax(-1), atol=0.03)


def test_penalties_lower_what_was_said():
    again = Sampler(frequency_penalty=0.6)
    assert [again(LOGITS) for _ in range(4)] == [0, 0, 1, 0]  # 2, then 1.4, then 0.8 < 1; 1 - 0.6 < 0.8
    once = Sampler(presence_penalty=1.5)
    assert [once(LOGITS) for _ in range(3)] == [0, 1, 0]  # 2, then 0.5 < 1, then 0.5 > -0.5
    heard = Sampler(repetition_penalty=3, prompt_ids=[0, 9])  # 9: an id that this model has no logit for
    assert [heard(LOGITS) for _ in range(2)] == [1, 0]  # 2/3 < 1, then 1/3 < 2/3
    assert Sampler(repetition_penalty=3, prompt_ids=[1, 2, 3])(LOGITS - 5) == 0  # negative logits get lower
    assert torch.equal(LOGITS, torch.tensor([2.0, 1.0, 0.0, -1.0]))  # nobody's logits are changed


def test_the_same_seed_draws_the_same():
    def draws(seed):
        sampler = Sampler(temperature=2.0, seed=seed)
        return [sampler(LOGITS) for _ in range(30)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_values_out_of_range_are_refused_by_name(how, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(**how)


@pytest.mark.parametrize("shape", [(0,), (2, 5), ()])
@pytest.mark.parametrize("temperature", [0, 1])
def test_only_the_logits_of_one_position_are_taken(shape, temperature):
    with pytest.raises(ShapeError, match="one position"):
        Sampler(temperature)(torch.zeros(shape))


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match="not finite"):
        Sampler()(torch.tensor([1.0, float("nan")]))
