"""Chapter 2: the two products of a head in a grouped layer, and a head made by hand."""

from typing import Any

import torch

from attnlab.exercises._tools import Mistake, call, compare, parts, tensor
from attnlab.layers import GroupedQueryAttention
from attnlab.tasks import PARTS, Wishes


def forms_of_a_head(answer: Any) -> str:
    """2.1: ``f(layer, h)`` gives W_Qᵀ W_K and W_O W_V of query head h, each (d_model, d_model)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = GroupedQueryAttention(d_model=24, n_heads=6, n_kv_heads=2)
    for h in (0, 1, 4):  # 0 is right by every way of counting heads; the others tell the ways apart
        where, what = parts(call(answer, layer, h), 2, "W_Qᵀ W_K and W_O W_V")
        _compare_forms(layer, h, where, what)
    return "right: rows of W_Q, W_K, W_V, columns of W_O, and the right K/V head."


def _compare_forms(layer: GroupedQueryAttention, h: int, where: Any, what: Any) -> None:
    D, kv = layer.head_dim, h // layer.group_size
    q, k, v, o = (m.weight.detach().double() for m in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))

    def head(i: int) -> slice:
        return slice(D * i, D * (i + 1))

    q_h, k_h, v_h, o_h = q[head(h)], k[head(kv)], v[head(kv)], o[:, head(h)]
    other = head(h % layer.n_kv_heads)
    neighbours = f"Query head {h} reads key/value head {kv}: a group's heads are neighbours, h // group_size, not h % n_kv_heads."
    compare(where, q_h.T @ k_h, {
        neighbours: q_h.T @ k[other],
        "W_Qᵀ W_K is transposed: its rows belong to the asker (W_Q), its columns to the one asked (W_K).": k_h.T @ q_h,
        "The scale is in it; W_Qᵀ W_K alone is asked for, without 1/√D.": q_h.T @ k_h / D**0.5,
        "That is W_Q W_Kᵀ, head_dim by head_dim. nn.Linear has a row for each output, so the transpose stands on the left.":
            q_h @ k_h.T,
        "A head's rows stand together: h·D to (h+1)·D, not every n-th.": q[h :: layer.n_heads].T @ k_h,
    }, what=f"W_Qᵀ W_K of head {h}")  # fmt: skip
    compare(what, o_h @ v_h, {
        neighbours: o_h @ v[other],
        "W_O W_V is transposed: its rows are what is written (W_O), its columns what is read (W_V).": v_h.T @ o_h.T,
        "That is W_V W_O, head_dim by head_dim. W_V comes first, so it stands on the right: W_O W_V.": v_h @ o_h,
        "Of W_O a head has columns, not rows: W_O's inputs are the heads side by side.": o[head(h)].T @ v_h,
    }, what=f"W_O W_V of head {h}")  # fmt: skip


def head_by_hand(answer: Any) -> str:
    """2.2: W_Q, W_K, W_V (16, 48) and W_O (48, 16) that solve ``Wishes`` without training."""
    task, head_dim = Wishes(), 16
    layer = Wishes().new_layer(head_dim)
    names = ("W_Q", "W_K", "W_V", "W_O")
    for name, given, module in zip(names, parts(answer, 4, ", ".join(names)), layer.children(), strict=True):
        weight, shape = tensor(given, name).to(torch.float32), tuple(module.weight.shape)
        if tuple(weight.shape) == shape[::-1]:
            raise Mistake(f"{name} is {shape[::-1]}: nn.Linear stores (outputs, inputs), so it should be {shape}.")
        if tuple(weight.shape) != shape:
            raise Mistake(f"{name} should be {shape}, as nn.Linear stores it; got {tuple(weight.shape)}.")
        if not weight.isfinite().all():
            raise Mistake(f"There are numbers in {name} that are infinite or not numbers (NaN).")
        module.weight.data = weight
    found, answered = task.score(layer)
    if answered > 0.99 and found < 0.01:
        return "right, the unexpected way: it votes against what all the others carry."
    if answered > 0.99:
        return "right: no training, and every token has what it wished for."
    raise Mistake(_diagnosis(task, layer, found))


@torch.no_grad()
def _diagnosis(task: Wishes, layer: GroupedQueryAttention, found: float) -> str:
    x, wanted, answers = task.batch(64, torch.Generator().manual_seed(0))
    out, weights = layer(x, return_weights=True)
    if weights.amax(-1).median() < 0.1:
        return "All weights are nearly equal: no score stands out. Is one of W_Q and W_K zero?"
    top = weights[:, 0].argmax(-1)

    def mostly(hits: torch.Tensor) -> bool:
        return bool(hits.float().mean() > 0.9)

    if mostly(top == wanted.argsort(-1)):
        return "W_Q and W_K are exchanged: each token looks at the one that wishes for it. The asker's wish belongs in W_Q."
    if mostly(top == torch.arange(task.n_tokens)):
        return "Each token looks at itself: W_Q and W_K read the same part. The query is the wish, the key is the name."
    if found < 0.5:
        return f"Only {found:.0%} of the tokens look at the one they wish for: compare the asker's wish with the other's name."
    if found < 0.99:
        return f"Nearly: {found:.0%} of the tokens look at the one they wish for. All sixteen numbers of a name are needed."
    if mostly(out[..., PARTS["payload"]].argmax(-1) == answers):
        return "It looks at the right token, and leaves the payload where it was: W_O has to write into the wish part."
    if mostly(out[..., PARTS["name"]].argmax(-1) == answers):
        return "It looks at the right token, but W_O writes into the name part; the answer is read from the wish part."
    if mostly((-out[..., PARTS["wish"]]).argmax(-1) == answers):
        return "It looks at the right token, and copies its payload with a minus sign."
    for part in ("name", "wish"):
        read = x[torch.arange(len(x))[:, None], wanted][..., PARTS[part]]
        if torch.cosine_similarity(out[..., PARTS["wish"]], read, dim=-1).mean() > 0.8:
            return f"It looks at the right token, but W_V reads its {part}; the payload is asked for."
    return "It looks at the right token, but what stands in the wish part afterwards isn't that token's payload."


CHECKS = {"2.1": forms_of_a_head, "2.2": head_by_hand}
