"""What heads do, in numbers, each beside a control.

A head is scored by the mean weight it gives from chosen queries to chosen keys. High means little alone: a head that
looks three tokens back hits many brackets. So every score has a control, the same mean where the explanation does not
hold, and a head counts for what it has above it. Choose heads on one text and report them on another
(``HeadScores.at``): the best of many is flattered by the text that chose it.

A score says where a head looks. What it does to the output is another question, and ``ablated`` asks it: take the head
away, and see what the model can no longer do.

The scores take ``weights`` (L, H, T, S), a record's or any array or tensor, and positions in that text.
"""

import io
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.errors import ConfigError, InputError, ShapeError
from attnlab.layers import GroupedQueryAttention

Weights = Float[np.ndarray, "L H T S"]
OPENERS, CLOSERS = "([{", ")]}"
PREFIXES = "rRbBuUfFtT"  # of string literals


@dataclass(frozen=True)
class HeadScores:
    """Mean weights by layer and head, over ``n`` and ``n_control`` pairs of query and key."""

    score: Float[np.ndarray, "L H"]
    control: Float[np.ndarray, "L H"]
    n: int
    n_control: int

    def best(self) -> tuple[int, int]:
        """(layer, head) with the most above its control."""
        layer, head = np.unravel_index(np.argmax(self.score - self.control), self.score.shape)
        return int(layer), int(head)

    def at(self, head: tuple[int, int]) -> dict:
        """One head's numbers: to report on this text a head that another text chose."""
        return {
            "head": f"{head[0]}.{head[1]}",
            "score": float(self.score[head]),
            "control": float(self.control[head]),
            "n": self.n,
            "n_control": self.n_control,
        }

    @classmethod
    def pool(cls, parts: Iterable["HeadScores"]) -> "HeadScores":
        """Several texts as one, every pair counting the same. Raises InputError where there is no pair at all."""
        parts = list(parts)
        n, n_control = sum(p.n for p in parts), sum(p.n_control for p in parts)
        if n == 0 or n_control == 0:
            raise InputError(f"nothing to score: {n} pairs and {n_control} control pairs; give longer or other text")
        return cls(
            sum(p.score * p.n for p in parts) / n, sum(p.control * p.n_control for p in parts) / n_control, n, n_control
        )


def scores_of(
    weights: Weights, pairs: tuple[Sequence[int], Sequence[int]], controls: tuple[Sequence[int], Sequence[int]]
) -> HeadScores:
    """Mean weight at ``pairs`` = (queries, keys) and at ``controls``; zeros where there are none."""
    score, n = _mean_at(weights, *pairs)
    control, n_control = _mean_at(weights, *controls)
    return HeadScores(score, control, n, n_control)


def previous_token(weights: Weights) -> HeadScores:
    """Weight on the token just before the query. Control: on the one before that."""
    queries = np.arange(2, _length(weights))
    return scores_of(weights, (queries, queries - 1), (queries, queries - 2))


def sink(weights: Weights, first_query: int = 64) -> HeadScores:
    """Weight on position 0, from queries at ``first_query`` or later. Control: on position 1.

    A model with a window must see position 0 from all of them: give it no more tokens than its window.
    """
    queries = np.arange(first_query, _length(weights))
    return scores_of(weights, (queries, 0 * queries), (queries, 0 * queries + 1))


# Induction: … A B … A, and the next token is B again (Olsson et al. 2022, "In-context Learning and Induction Heads").


def induction_on_repeat(weights: Weights, n: int) -> HeadScores:
    """Weight on the token after the earlier copy, in a text of one first token, ``n`` tokens, and the same ``n`` again.

    Control: the mean over the first copy's other tokens, from the same queries.

    Worked example, n = 3: ``<s> a b c a b c``. The query at 4 (the second a) should look at 2 (b, which came after the
    first a), 5 at 3; 6 is left out, since nothing has shown what follows it. The control is 1 and 3, then 1 and 2.
    """
    if _length(weights) < 2 * n + 1 or n < 3:
        raise ShapeError(f"expected 1 + 2 × {n} tokens, n at least 3; got {_length(weights)}")
    queries = np.arange(n + 1, 2 * n)
    keys = queries - n + 1
    others = [(q, k) for q, right in zip(queries, keys, strict=True) for k in range(1, n + 1) if k != right]
    return scores_of(weights, (queries, keys), tuple(np.array(others).T))


def induction_in_text(
    weights: Weights, ids: Int[np.ndarray, " T"], min_distance: int = 6, window: int | None = None, seed: int = 0
) -> HeadScores:
    """Weight on the continuation, where the last two tokens stood together before and went on in the same way.

    The earlier place is the last such, at least ``min_distance`` tokens back. Control: the same distance from queries
    whose two tokens are new, so that no match explains it. Keys beyond ``window`` or at position 0 don't count.
    """
    queries, keys, new = [], [], []
    seen: dict[tuple[int, int], list[int]] = {}
    for q in range(2, len(ids) - 1):
        pair = (int(ids[q - 1]), int(ids[q]))
        earlier = seen.setdefault(pair, [])
        if not earlier:
            new.append(q)
        far = [p for p in earlier if q - p >= min_distance]
        if far and ids[far[-1] + 1] == ids[q + 1] and _within(q, far[-1] + 1, window):
            queries.append(q)
            keys.append(far[-1] + 1)
        earlier.append(q)
    distances = np.array(queries, dtype=int) - np.array(keys, dtype=int)
    return scores_of(weights, (queries, keys), _elsewhere(np.array(new, dtype=int), distances, window, seed))


def sink_by_novelty(weights: Weights, ids: Int[np.ndarray, " T"], first_query: int = 64) -> HeadScores:
    """Weight on position 0 where the last two tokens are new in this text. Control: where they stood before.

    A head that rests on position 0 while it has nothing to copy scores high and its control low.
    """
    seen, new, known = set(), [], []
    for q in range(2, len(ids)):
        pair = (int(ids[q - 1]), int(ids[q]))
        if q >= first_query:
            (known if pair in seen else new).append(q)
        seen.add(pair)
    return scores_of(weights, (new, [0] * len(new)), (known, [0] * len(known)))


# Brackets and quotes


class Match(NamedTuple):
    """An opener and its closer: positions in a text, in characters or in tokens."""

    kind: str  # "bracket" or "quote"
    opener: int
    closer: int


def matches_in_python(source: str) -> list[Match]:
    """True brackets and string quotes of a whole Python file, as character offsets, in order of their closers.

    Python's own ``tokenize`` finds them: a bracket inside a string or a comment is text, not a bracket. A string's
    quote is its delimiter, one or three of them, after any prefix. An f-string is one string, whatever it holds. Text
    that Python cannot tokenize gives what came before.
    """
    starts = np.cumsum([0] + [len(line) + 1 for line in source.split("\n")])

    def offset(place: tuple[int, int]) -> int:
        return int(starts[place[0] - 1]) + place[1]

    found, open_brackets, open_strings = [], [], []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            kind, string = tokenize.tok_name[token.type], token.string
            if kind.endswith("STRING_START"):  # Python 3.12 and later cut f-strings up; they stay whole here
                open_strings.append(offset(token.end) - _quote_width(string.lstrip(PREFIXES)))
            elif kind.endswith("STRING_END"):
                opener = open_strings.pop()
                if not open_strings:
                    found.append(Match("quote", opener, offset(token.start)))
            elif open_strings:
                continue
            elif kind == "OP" and string in OPENERS:
                open_brackets.append(offset(token.start))
            elif kind == "OP" and string in CLOSERS and open_brackets:
                found.append(Match("bracket", open_brackets.pop(), offset(token.start)))
            elif kind == "STRING":
                quoted = string.lstrip(PREFIXES)
                opener = offset(token.start) + len(string) - len(quoted)
                found.append(Match("quote", opener, offset(token.end) - _quote_width(quoted)))
    except (tokenize.TokenError, SyntaxError):
        pass
    return sorted(found, key=lambda match: match.closer)


def in_tokens(matches: Sequence[Match], token_starts: Sequence[int]) -> list[Match]:
    """The same matches counted in tokens, given the character where each token starts."""
    starts = np.asarray(token_starts)

    def token(character: int) -> int:
        return int(np.searchsorted(starts, character, side="right")) - 1

    return [Match(m.kind, token(m.opener), token(m.closer)) for m in matches]


def matching(
    weights: Weights,
    matches: Sequence[Match],
    *,
    at_closer: bool = False,
    control: str = "distance",
    distances: tuple[int, int] = (4, 150),
    window: int | None = None,
    seed: int = 0,
) -> HeadScores:
    """Weight on a closer's own opener, from the token before the closer (which must predict it) or from the closer.

    Only matches ``distances`` tokens apart count. Give matches of one kind. The control asks another question each:

    - ``"distance"``: the same distance, from another closer whose opener is elsewhere. Beaten: no fixed offset.
    - ``"others"``: another opener, at about the same distance (within half of it). Beaten: not any opener.
    - ``"nested"``: only closers with a nearer pair, already closed, in between; control is the nearest such opener.
      Beaten: not the last opener seen. ``f(a, g(b), c)``: the last ``)`` belongs to the first ``(``.
    """
    back = 0 if at_closer else 1
    low, high = distances
    matches = [m for m in matches if m.opener > 0]  # position 0 is where heads rest
    chosen = [m for m in matches if low <= m.closer - m.opener <= high and _within(m.closer, m.opener, window)]
    pairs, controls = [], []
    own = {m.closer: m.opener for m in matches}
    if control == "distance":
        pairs = [(m.closer - back, m.opener) for m in chosen]
        rng = np.random.default_rng(seed)
        for m in chosen:
            d = m.closer - m.opener
            others = [c for c in own if c != m.closer and c - d > 0 and c - d != own[c]]
            if others:
                c = others[rng.integers(len(others))]
                controls.append((c - back, c - d))
    elif control == "others":
        pairs = [(m.closer - back, m.opener) for m in chosen]
        for m in chosen:
            d = m.closer - m.opener
            about = [o for o in own.values() if o != m.opener and o < m.closer - back and 2 * abs(o - m.opener) <= d]
            controls += [(m.closer - back, min(about, key=lambda o: (abs(o - m.opener), o)))] if about else []
    elif control == "nested":
        for m in chosen:
            inside = [o for c, o in own.items() if m.opener < o and c < m.closer]
            if inside:
                pairs.append((m.closer - back, m.opener))
                controls.append((m.closer - back, max(inside)))
    else:
        raise InputError(f'control must be "distance", "others" or "nested"; got {control!r}')
    return scores_of(weights, _columns(pairs), _columns(controls))


# Taking a model apart


@torch.no_grad()
def weights_of(model: nn.Module, ids: Int[Tensor, "B T"]) -> Float[np.ndarray, "B L H T T"]:
    """Attention weights of every row: all rows at once, for a small model and short rows.

    ``model(ids, last_only=True, on_weights=…)`` is called, as ``Mistral`` and ``tasks.AttentionOnly`` understand it.
    """
    layers: list[Tensor] = []
    model(ids, last_only=True, on_weights=lambda _, weights: layers.append(weights.float().cpu()))
    return torch.stack(layers, dim=1).numpy()


@contextmanager
def ablated(model: nn.Module, *heads: tuple[int, int], mean_over: Int[Tensor, "B T"] | None = None) -> Iterator[None]:
    """Within the ``with`` block these heads, as (layer, head), add nothing to the residual stream.

    A query head's output is its slice of what ``o_proj`` reads; that slice is set to 0 on the way in. No weight is
    touched, and the head's key/value head goes on serving the other query heads of its group. Layers are the model's
    ``GroupedQueryAttention`` modules, counted from 0 in the order they stand in.

    Args:
        mean_over: ids. The slice becomes the head's mean over all their positions instead: what it says on average stays,
            and only what depends on the text is lost.

    Raises ConfigError for a layer or head that is not there.

    >>> layer = GroupedQueryAttention(8, n_heads=2)
    >>> x = torch.randn(1, 3, 8)
    >>> with ablated(layer, (0, 0), (0, 1)):
    ...     bool((layer(x) == 0).all())
    True
    """
    layers = [module for module in model.modules() if isinstance(module, GroupedQueryAttention)]
    for layer, head in heads:
        if not (0 <= layer < len(layers) and 0 <= head < layers[layer].n_heads):
            sizes = f"{len(layers)} layers of {layers[0].n_heads} heads" if layers else "no attention layer"
            raise ConfigError(f"there is no head {head} in layer {layer}: the model has {sizes}, counted from 0")
    means = None if mean_over is None else _mean_outputs(model, layers, mean_over)
    with ExitStack() as hooks:
        for layer, head in heads:
            o_proj, D = layers[layer].o_proj, layers[layer].head_dim
            its_slice = slice(head * D, (head + 1) * D)
            value = 0.0 if means is None else means[layer][its_slice]
            hooks.enter_context(o_proj.register_forward_pre_hook(_setting(its_slice, value)))
        yield


def _setting(its_slice: slice, value: float | Tensor) -> Callable:
    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        outputs = args[0].clone()  # (B, T, H·D)
        outputs[..., its_slice] = value
        return (outputs,)

    return hook


@torch.no_grad()
def _mean_outputs(model: nn.Module, layers: list[GroupedQueryAttention], ids: Tensor) -> list[Tensor]:
    """What each layer's ``o_proj`` reads, (H·D), on average over rows and positions."""
    means: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.o_proj.register_forward_pre_hook(lambda _, args: means.append(args[0].mean((0, 1))))
            hooks.enter_context(hook)
        model(ids)
    return means


def _quote_width(quoted: str) -> int:
    """3 for a triple quote at the start; two quotes alone are an empty string."""
    return 3 if quoted[:3] in ('"""', "'''") else 1


def _columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(pairs, dtype=int).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _within(query: int, key: int, window: int | None) -> bool:
    return key > 0 and (window is None or query - key < window)


def _elsewhere(queries: np.ndarray, distances: np.ndarray, window: int | None, seed: int):
    """For each distance, one of ``queries`` that has room for it, and the key there."""
    rng = np.random.default_rng(seed)
    pairs = []
    for d in distances:
        room = queries[queries > d]
        if len(room) and (window is None or d < window):
            q = room[rng.integers(len(room))]
            pairs.append((q, q - d))
    return _columns(pairs)


def _length(weights: Weights) -> int:
    if len(weights.shape) != 4:
        raise ShapeError(f"expected weights (layers, heads, T, S); got {tuple(weights.shape)}")
    return weights.shape[2]


def _mean_at(weights: Weights, queries: Sequence[int], keys: Sequence[int]) -> tuple[np.ndarray, int]:
    _length(weights)
    L, H, T, S = weights.shape
    queries, keys = np.asarray(queries, dtype=int), np.asarray(keys, dtype=int)
    if not len(queries):
        return np.zeros((L, H)), 0
    if queries.min() < 0 or keys.min() < 0 or queries.max() >= T or keys.max() >= S:
        raise ShapeError(f"positions reach {queries.max()} and {keys.max()}; the weights are {T} × {S}")
    picked = weights[:, :, queries, keys]
    if hasattr(picked, "detach"):  # a tensor, wherever it is
        picked = picked.detach().float().cpu().numpy()
    return picked.astype(np.float64).mean(-1), len(queries)
