"""mistral.py against transformers.MistralForCausalLM with the same weights, in float32."""

import pytest
import torch
import transformers

from attnlab import Mistral, MistralConfig
from attnlab.errors import ConfigError, InputError, ShapeError

NAMES = {
    "model.embed_tokens": "embed", "model.layers": "blocks", "self_attn": "attention", "mlp": "feed_forward",
    "post_attention_layernorm": "ffn_norm", "input_layernorm": "attention_norm", "model.norm": "norm",
}  # fmt: skip


def pair(**changes):
    """One set of random weights in both implementations."""
    numbers = {"vocab_size": 53, "d_model": 48, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "d_ff": 100}
    c = MistralConfig(**(numbers | changes))
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, sliding_window=c.window,
            rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    with torch.no_grad():  # their initial weights are small: larger ones make attention matter
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights[name] = tensor
    ours = Mistral(c).eval()
    ours.load_state_dict(weights)
    return ours, theirs


CONFIGS = [
    {},
    {"n_kv_heads": 8},
    {"n_kv_heads": 1},
    {"head_dim": 10},
    {"window": 1},
    {"window": 5},
    {"window": 1000},
    {"window": 5, "n_kv_heads": 1, "rope_theta": 1e6},
    {"rope_theta": 1e6},
    {"tie_embeddings": True},
    {"vocab_size": 7, "d_model": 30, "n_heads": 5, "n_kv_heads": 5, "d_ff": 13, "n_layers": 1},
    {"n_heads": 6, "n_kv_heads": 3, "d_model": 36, "norm_eps": 1e-6, "window": 7},
]


@torch.no_grad()
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_transformers(changes, batch):
    ours, theirs = pair(**changes)
    ids = torch.randint(0, ours.config.vocab_size, (batch, 19), generator=torch.Generator().manual_seed(1))
    want = theirs(ids).logits
    atol = 1e-5 * float(want.std())

    def close(got, want):
        torch.testing.assert_close(got, want, atol=atol, rtol=0)

    close(ours(ids), want)  # prefill
    close(ours(ids, last_only=True), want[:, -1:])
    for sizes in ([1] * 19, [7, 5, 1, 6], [12, 1, 1, 1, 1, 1, 1, 1]):  # decode, chunks, prefill then decode
        cache, out, t = ours.new_cache(batch, 19), [], 0
        for size in sizes:
            out.append(ours(ids[:, t : t + size], cache))
            t += size
        close(torch.cat(out, 1), want)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"window": 5}], ids=str)
def test_attention_weights_equal_transformers(changes):
    ours, theirs = pair(**changes)
    ids = torch.randint(0, 53, (2, 11), generator=torch.Generator().manual_seed(1))
    seen = {}
    ours(ids, on_weights=seen.__setitem__)
    for layer, want in enumerate(theirs(ids, output_attentions=True).attentions):
        torch.testing.assert_close(seen[layer], want, atol=1e-6, rtol=1e-4)


def test_presets_have_mistral_s_published_sizes():
    for name, parameters in (("mistral-7b-v0.1", 7_241_732_096), ("mistral-7b-v0.3", 7_248_023_552)):
        with torch.device("meta"):
            model = Mistral(MistralConfig.preset(name))
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == 291
    with pytest.raises(ConfigError, match=r"mistral-7b-v0\.1"):
        MistralConfig.preset("mistral-8b")


@pytest.mark.parametrize(
    "changes",
    [{"n_kv_heads": 3}, {"window": 0}, {"window": -5}, {"d_ff": 0}, {"n_layers": 2.0}, {"head_dim": 7}, {"d_model": 50},
     {"rope_theta": -1.0}, {"norm_eps": 0.0}],
    ids=str,
)  # fmt: skip
def test_configs_that_cannot_work_are_refused(changes):
    numbers = {"vocab_size": 53, "d_model": 48, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "d_ff": 100}
    with pytest.raises(ConfigError):
        MistralConfig(**(numbers | changes))


def test_input_that_cannot_be_used():
    model = Mistral(MistralConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8))
    with pytest.raises(InputError, match="no tokens"):
        model(torch.zeros(1, 0, dtype=torch.long))
    for dtype in (torch.float32, torch.bool, torch.uint8, torch.complex64):
        with pytest.raises(ShapeError, match="whole numbers"):
            model(torch.zeros(1, 3, dtype=dtype))
    with pytest.raises(ShapeError, match=r"\(B, T\)"):
        model(torch.zeros(3, dtype=torch.long))
    for outside in (9, -1):
        with pytest.raises(InputError, match="from 0 to 8; got .*" + str(outside)):
            model(torch.tensor([[3, outside]]))
