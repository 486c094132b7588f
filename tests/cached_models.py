"""A small model with a window, every kind of cache it can have, and texts taken in piece by piece."""

import torch

from attnlab import Mistral, MistralConfig

W = 4
KINDS = [{}, {"rolling": False}, {"static": True}, {"rolling": False, "static": True}]
QUANTIZED_KINDS = [{"quantize": "int8", **kind} for kind in KINDS]


def small_model(window=W, n_kv_heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=31, d_model=16, n_layers=2, n_heads=4, n_kv_heads=n_kv_heads, d_ff=24, window=window
    )
    return Mistral(config).to(dtype).eval()


def in_chunks(model, ids, sizes, **kind):
    """Logits of all ids, which come in pieces of these sizes (or of one size), and the cache that holds them."""
    cache = model.new_cache(ids.shape[0], 64, **kind)
    return torch.cat([model(part, cache) for part in ids.split(sizes, 1)], 1), cache


def three_rows(model, seed, **kind):
    """Ids (3, 12), and a cache whose rows have taken in 5, 9 and 2 of them."""
    ids = torch.randint(0, 31, (3, 12), generator=torch.Generator().manual_seed(seed))
    cache = model.new_cache(3, 64, **kind)
    for i, length in enumerate((5, 9, 2)):
        model(ids[i : i + 1, :length], cache.row(i))
    return ids, cache
