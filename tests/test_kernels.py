"""The product for one row: the same numbers to rounding, the same weights, and only where it helps."""

import pytest
import torch
from torch import nn

from attnlab import Mistral, MistralConfig, kernels
from attnlab.checkpoint import load_model, save_model
from attnlab.kernels import OneRowLinear, suit_processor_
from attnlab.quantize import quantize_

CONFIG = MistralConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, window=8, tie_embeddings=True
)  # fmt: skip


@pytest.fixture(autouse=True)
def matrix_instructions(monkeypatch):
    """Whatever processor this is: torch.mv is right on all of them."""
    monkeypatch.setattr(kernels, "has_matrix_instructions", lambda: True)


def model(dtype: torch.dtype = torch.bfloat16) -> Mistral:
    torch.manual_seed(0)
    return Mistral(CONFIG).to(dtype).eval()


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32), (3, 32), (2, 3, 32), (0, 32)])
def test_the_product_is_that_of_nn_linear_for_any_number_of_rows(shape):
    linear = nn.Linear(32, 48, bias=False).bfloat16()
    other, x = OneRowLinear(linear.weight), torch.randn(shape).bfloat16()
    expected = x.double() @ linear.weight.double().T
    assert other(x).shape == expected.shape and other(x).dtype == torch.bfloat16
    assert ((other(x).double() - expected).abs() <= 2.0**-7 * expected.abs() + 1e-3).all()


def test_a_model_keeps_its_weights_their_names_and_its_tied_matrix():
    plain, suited = model(), suit_processor_(model())
    assert all(isinstance(m, OneRowLinear) for m in suited.modules() if isinstance(m, nn.Linear))
    assert suited.lm_head.weight is suited.embed.weight
    assert suited.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in suited.named_parameters()] == [name for name, _ in plain.named_parameters()]
    ids, cache = torch.tensor([[1, 2, 3, 4, 5, 6]]), suited.new_cache()
    with torch.inference_mode():
        one_by_one = torch.cat([suited(ids[:, i : i + 1], cache=cache) for i in range(6)], dim=1)
        assert (one_by_one - plain(ids)).abs().max() < 0.05 * plain(ids).std() + 0.02


def test_only_bfloat16_and_only_where_the_processor_has_the_instructions(monkeypatch):
    assert not any(isinstance(m, OneRowLinear) for m in suit_processor_(model(torch.float32)).modules())
    monkeypatch.setattr(kernels, "has_matrix_instructions", lambda: False)
    assert not any(isinstance(m, OneRowLinear) for m in suit_processor_(model()).modules())


def test_a_loaded_model_is_suited_and_can_be_quantized_converted_and_saved(tmp_path):
    save_model(model(), tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert isinstance(loaded.blocks[0].attention.q_proj, OneRowLinear)
    save_model(loaded, tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
    assert not any(isinstance(m, OneRowLinear) for m in quantize_(loaded, "int8").blocks.modules())
