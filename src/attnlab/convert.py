"""From a model with many K/V heads to one with few: every group's K/V heads are pooled into one (arXiv 2305.13245, section 2.1).

Query heads, outputs and everything else stay as they are. What comes out runs at once; how well it predicts is another
matter, and the paper trains it on for some percent of its first training.
"""

import copy
import shutil
from pathlib import Path
from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.checkpoint import load_model, save_model
from attnlab.errors import ConfigError, InputError
from attnlab.loading import find_folder
from attnlab.mistral import Mistral
from attnlab.tokenizer import load_tokenizer

Pooling = Literal["mean", "first", "random"]
TOKENIZER_FILES = ("tokenizer*", "tekken*.json", "special_tokens_map.json", "chat_template.*")


def pool_heads(
    weight: Float[Tensor, "rows d"],
    n_kv_heads: int,
    head_dim: int,
    pooling: Pooling = "mean",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "fewer d"]:
    """The matrix of ``n_kv_heads`` heads from that of a multiple of them; a head owns ``head_dim`` neighbouring rows.

    Neighbours are pooled: they are the ones whose query heads will share a K/V head. ``"mean"`` averages them, ``"first"``
    keeps the first of each, ``"random"`` keeps none and draws from N(0, the matrix's own standard deviation).

    Raises ConfigError for heads that do not divide, or an unknown pooling.

    >>> four_heads_of_one = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    >>> pool_heads(four_heads_of_one, n_kv_heads=2, head_dim=1).T
    tensor([[ 2., 15.]])
    """
    if pooling not in get_args(Pooling):
        raise ConfigError(f"pooling must be one of {', '.join(get_args(Pooling))}; got {pooling!r}")
    n_heads, rest = divmod(weight.shape[0], head_dim)
    if rest:
        raise ConfigError(
            f"{weight.shape[0]} rows are not a whole number of heads of {head_dim}: give the right head_dim"
        )
    _check_fewer(n_heads, n_kv_heads)
    if n_kv_heads == n_heads:
        return weight.clone()
    if pooling == "mean":
        heads = reduce(weight.float(), "(Hkv n D) d -> Hkv D d", "mean", Hkv=n_kv_heads, D=head_dim)
    elif pooling == "first":
        heads = rearrange(weight, "(Hkv n D) d -> Hkv n D d", Hkv=n_kv_heads, D=head_dim)[:, 0]
    else:
        heads = torch.randn(n_kv_heads, head_dim, weight.shape[1], generator=generator) * weight.float().std().cpu()
    return rearrange(heads, "Hkv D d -> (Hkv D) d").to(weight)


def to_grouped(model: Mistral, n_kv_heads: int, pooling: Pooling = "mean", seed: int = 0) -> Mistral:
    """A copy of ``model`` with ``n_kv_heads`` K/V heads, keys and values of each group's heads pooled (see ``pool_heads``).

    ``seed`` is for ``"random"`` alone. Raises ConfigError for heads that do not divide, or an unknown pooling.
    """
    generator = torch.Generator().manual_seed(seed)
    converted = copy.deepcopy(model)
    for block in converted.blocks:
        attention = block.attention
        for projection in (attention.k_proj, attention.v_proj):
            pooled = pool_heads(projection.weight.detach(), n_kv_heads, attention.head_dim, pooling, generator)
            projection.weight = nn.Parameter(pooled)
            projection.out_features = len(pooled)
        attention.n_kv_heads = n_kv_heads
    converted.config = model.config.replace(n_kv_heads=n_kv_heads)
    return converted


def align_heads(model: Mistral, n_kv_heads: int, rounds: int = 10) -> Mistral:
    """A copy that computes the same, its K/V heads turned so that those which ``to_grouped`` would pool resemble each other.

    A head's coordinates are nobody's business but its own. Values may be turned by any orthogonal matrix if the output
    matrix turns them back. Keys may be turned if the queries turn with them, but only within the pairs that rotary
    positions turn, by one angle each. Each head in turn is turned to fit the sum of its group's others best: for values
    that is the orthogonal Procrustes problem (Jin et al. 2024, arXiv 2412.20677), for a pair of rows a mean angle.

    Raises ConfigError for heads that do not divide.
    """
    _check_fewer(model.config.n_kv_heads, n_kv_heads)
    aligned = copy.deepcopy(model)
    for attention in (block.attention for block in aligned.blocks):
        Hkv, D = attention.n_kv_heads, attention.head_dim
        v = rearrange(attention.v_proj.weight.detach().double(), "(Hkv D) d -> Hkv D d", D=D)
        o = rearrange(attention.o_proj.weight.detach().double(), "d (Hkv G D) -> Hkv G d D", Hkv=Hkv, D=D)
        k = _pairs(rearrange(attention.k_proj.weight.detach().double(), "(Hkv D) d -> Hkv D d", D=D))  # (Hkv, D/2, d)
        q = _pairs(rearrange(attention.q_proj.weight.detach().double(), "(Hkv G D) d -> Hkv G D d", Hkv=Hkv, D=D))
        for pool in torch.arange(Hkv).chunk(n_kv_heads) if n_kv_heads < Hkv else ():
            for head in pool.repeat(rounds):
                others = pool[pool != head]
                u, _, w = torch.linalg.svd(v[others].sum(0) @ v[head].T)
                turn = u @ w  # the orthogonal matrix that brings v[head] nearest to the others
                v[head], o[head] = turn @ v[head], o[head] @ turn.T
                phase = (k[others].sum(0) * k[head].conj()).sum(-1, keepdim=True).angle()  # (D/2, 1)
                turn = torch.polar(torch.ones_like(phase), phase)
                k[head], q[head] = turn * k[head], turn * q[head]
        for projection, rows in (
            (attention.v_proj, rearrange(v, "Hkv D d -> (Hkv D) d")),
            (attention.o_proj, rearrange(o, "Hkv G d D -> d (Hkv G D)")),
            (attention.k_proj, rearrange(torch.cat((k.real, k.imag), -2), "Hkv D d -> (Hkv D) d")),
            (attention.q_proj, rearrange(torch.cat((q.real, q.imag), -2), "Hkv G D d -> (Hkv G D) d")),
        ):
            projection.weight = nn.Parameter(rows.to(projection.weight))
    return aligned


def _check_fewer(n_heads: int, n_kv_heads: int) -> None:
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        possible = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
        raise ConfigError(
            f"{n_heads} K/V heads cannot be pooled into {n_kv_heads}: the number must divide {n_heads}; it could be one of "
            f"{possible}"
        )


def _pairs(rows: Float[Tensor, "*heads D d"]) -> Tensor:
    """Rows i and i + D/2, which rotary positions turn together, as one complex row."""
    return torch.complex(*rows.chunk(2, dim=-2))


def convert_folder(
    name: str | Path, out: str | Path, n_kv_heads: int, pooling: Pooling = "mean", seed: int = 0, align: bool = False
) -> Mistral:
    """Convert a checkpoint, named as for ``load``, and write a Hugging Face folder that ``load`` reads; the new model.

    ``align``: turn the heads with ``align_heads`` first. Weights stay in the dtype they are stored in; the tokenizer's files
    come along.

    Raises InputError for an ``out`` that is there and not an empty folder; else what ``load`` and ``to_grouped`` raise.
    """
    out = Path(out).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already: give a new folder, so that nothing is overwritten")
    _, folder = find_folder(str(name), revision=None, progress=True)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    model = to_grouped(align_heads(model, n_kv_heads) if align else model, n_kv_heads, pooling, seed)
    save_model(model, out, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    for pattern in TOKENIZER_FILES:
        for file in folder.glob(pattern):
            shutil.copyfile(file, out / file.name)
    return model
