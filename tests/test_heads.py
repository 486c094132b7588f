"""Scores of heads on weights made by hand: each head that does its thing scores 1, its control 0, and no other head."""

import copy

import numpy as np
import pytest
import torch

from attnlab import Mistral, MistralConfig, heads
from attnlab.errors import ConfigError, InputError, ShapeError
from attnlab.heads import HeadScores, Match

SOURCE = '''\
def f(a, b=[1, (2, 3)]):
    """A ( in a docstring."""
    x = g(a, h(b), "no ] bracket", r'x')  # nor ) here
    return {f"{x!r:>{a}} (": [''], 'k': b""}
\f
class C(f): pass
'''


def looking(T: int, *rules) -> np.ndarray:
    """Weights (1, len(rules), T, T): head i puts all of query q's weight on rules[i](q), or spreads it where that is None."""
    weights = np.zeros((1, len(rules), T, T), np.float16)
    for h, rule in enumerate(rules):
        for q in range(T):
            k = rule(q)
            if k is None:
                weights[0, h, q, : q + 1] = 1 / (q + 1)
            else:
                weights[0, h, q, k] = 1
    return weights


def first(q):
    return 0


def spread(q):
    return None


def test_previous_token_head_is_found():
    s = heads.previous_token(looking(20, first, lambda q: max(q - 1, 0), lambda q: max(q - 2, 0), spread))
    assert s.best() == (0, 1)
    assert s.score[0, :3].tolist() == [0, 1, 0] and s.control[0, :3].tolist() == [1 / 18, 0, 1]
    assert abs(s.score[0, 3] - s.control[0, 3]) < 1e-6
    assert s.n == s.n_control == 18


def test_sink_is_the_share_of_position_0_from_late_queries():
    s = heads.sink(looking(30, lambda q: 0 if q >= 10 else q, lambda q: 1 if q >= 10 else q), first_query=10)
    assert s.score.tolist() == [[1, 0]] and s.control.tolist() == [[0, 1]] and s.n == 20


def test_induction_head_is_told_from_a_head_that_finds_the_copy_itself():
    n, T = 5, 11
    inductive = looking(T, lambda q: q - n + 1 if q > n else 0, lambda q: q - n if q > n else 0)
    s = heads.induction_on_repeat(inductive, n)
    assert s.score.tolist() == [[1, 0]] and s.best() == (0, 0)
    assert s.control[0, 0] == 0 and s.control[0, 1] == 1 / (n - 1)
    assert (s.n, s.n_control) == (n - 1, (n - 1) ** 2)
    with pytest.raises(ShapeError, match="1 \\+ 2 × 6 tokens"):
        heads.induction_on_repeat(inductive, 6)


def test_induction_in_text_wants_the_same_two_tokens_and_the_same_continuation():
    #               0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    ids = np.array([0, 1, 2, 3, 9, 8, 7, 1, 2, 3, 6, 8, 7, 5, 4])
    # (1, 2) at 2 came again at 8 and went on with 3: the pair is query 8, key 3. (2, 3) and (8, 7) went on otherwise.
    s = heads.induction_in_text(looking(15, lambda q: 3 if q == 8 else 0, lambda q: max(q - 5, 0)), ids)
    assert s.n == 1 and s.score.tolist() == [[1, 1]]  # both look five back ...
    assert s.n_control == 1 and s.control.tolist() == [[0, 1]]  # ... but one does so everywhere
    assert s.best() == (0, 0)
    assert heads.induction_in_text(looking(15, first), ids, min_distance=7).n == 0
    assert heads.induction_in_text(looking(15, first), ids, window=5).n == 0
    assert heads.induction_in_text(looking(15, first), ids, window=6).n == 1


def test_sink_by_novelty_parts_new_from_seen():
    ids = np.array([0, 1, 2, 3, 1, 2, 3, 4])
    s = heads.sink_by_novelty(looking(8, lambda q: q if q in (5, 6) else 0), ids, first_query=3)
    assert (s.n, s.n_control) == (3, 2)  # 3, 4 and 7 are new; 5 and 6 end (1, 2) and (2, 3)
    assert s.score.tolist() == [[1]] and s.control.tolist() == [[0]]


def text_of(source: str, match: Match) -> str:
    return source[match.opener : match.closer + 1]


def test_python_decides_what_is_a_bracket_and_what_is_a_quote():
    found = heads.matches_in_python(SOURCE)
    brackets = [text_of(SOURCE, m) for m in found if m.kind == "bracket"]
    assert brackets == [
        "(2, 3)",
        "[1, (2, 3)]",
        "(a, b=[1, (2, 3)])",
        "(b)",
        """(a, h(b), "no ] bracket", r'x')""",
        "['']",
        """{f"{x!r:>{a}} (": [''], 'k': b""}""",
        "(f)",
    ]
    quotes = [text_of(SOURCE, m) for m in found if m.kind == "quote"]
    assert quotes == ['"""A ( in a docstring."', '"no ] bracket"', "'x'", '"{x!r:>{a}} ("', "''", "'k'", '""']
    assert [m.closer for m in found] == sorted(m.closer for m in found)


def test_broken_python_gives_what_came_before():
    found = heads.matches_in_python("f(a)\ng(')\nh(b)\n")
    assert Match("bracket", 1, 3) in found
    assert heads.matches_in_python("x = (1,\n") == []


def test_characters_become_tokens():
    assert heads.in_tokens([Match("bracket", 3, 9)], [0, 3, 4, 8]) == [Match("bracket", 1, 3)]


#             token 0 is <s>; f(a, g(b), c, d): 1 f  2 (  3 a  4 ,  5 g  6 (  7 b  8 )  9 ,  10 c  11 ,  12 d  13 )
NESTED = [Match("bracket", 6, 8), Match("bracket", 2, 13), Match("bracket", 15, 20)]


def test_bracket_head_is_told_from_a_last_bracket_head_only_by_nesting():
    own = {12: 2, 19: 15, 7: 6}
    last = {12: 6, 19: 15, 7: 6}
    weights = looking(22, lambda q: own.get(q, 0), lambda q: last.get(q, 0), lambda q: max(q - 4, 0))
    nested = heads.matching(weights, NESTED, control="nested", distances=(4, 150))
    assert (nested.n, nested.n_control) == (1, 1) and nested.best() == (0, 0)
    assert nested.score.tolist() == [[1, 0, 0]] and nested.control.tolist() == [[0, 1, 0]]
    plain = heads.matching(weights, NESTED, distances=(4, 5))
    assert plain.n == 1 and plain.score.tolist() == [[1, 1, 1]]  # 15 to 20: all three look right ...
    assert plain.control.tolist()[0][:2] == [0, 0] and plain.control[0, 2] == 1  # ... one is a fixed offset


def test_other_openers_near_by_are_a_control():
    matches = [Match("quote", 3, 12), Match("quote", 4, 7)]
    s = heads.matching(looking(14, lambda q: 4 if q == 11 else 0), matches, control="others", distances=(8, 150))
    assert (s.n, s.n_control) == (1, 1) and s.score[0, 0] == 0 and s.control[0, 0] == 1


def test_queries_stand_before_the_closer_or_at_it():
    weights = looking(22, lambda q: 2 if q == 12 else 0, lambda q: 2 if q == 13 else 0)
    kwargs = {"control": "nested", "distances": (4, 150)}
    assert heads.matching(weights, NESTED, **kwargs).score.tolist() == [[1, 0]]
    assert heads.matching(weights, NESTED, at_closer=True, **kwargs).score.tolist() == [[0, 1]]
    assert heads.matching(weights, NESTED, window=11, **kwargs).n == 0
    with pytest.raises(InputError, match="nested"):
        heads.matching(weights, NESTED, control="none")


def test_pooling_weighs_by_pairs_and_refuses_nothing():
    a = HeadScores(np.array([[1.0]]), np.array([[0.0]]), 1, 3)
    b = HeadScores(np.array([[0.0]]), np.array([[1.0]]), 3, 1)
    pooled = HeadScores.pool([a, b])
    assert (pooled.score[0, 0], pooled.control[0, 0], pooled.n, pooled.n_control) == (0.25, 0.25, 4, 4)
    assert pooled.at((0, 0)) == {"head": "0.0", "score": 0.25, "control": 0.25, "n": 4, "n_control": 4}
    with pytest.raises(InputError, match="0 pairs"):
        HeadScores.pool([HeadScores(np.zeros((1, 1)), np.zeros((1, 1)), 0, 0)])


def test_tensors_and_arrays_score_alike():
    weights = looking(20, first, spread)
    a, b = heads.previous_token(weights), heads.previous_token(torch.tensor(weights))
    assert (a.score == b.score).all() and (a.control == b.control).all()


def test_positions_outside_the_weights_are_refused():
    with pytest.raises(ShapeError, match="positions reach"):
        heads.scores_of(looking(4, first), ([4], [0]), ([1], [0]))
    with pytest.raises(ShapeError, match="layers, heads"):
        heads.previous_token(np.zeros((4, 4)))


# Ablation


@pytest.fixture
def grouped() -> Mistral:
    torch.manual_seed(0)
    return Mistral(MistralConfig(vocab_size=30, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, head_dim=8))


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(30, (3, 7), generator=torch.Generator().manual_seed(1))


def without_columns(model: Mistral, layer: int, head: int, ids: torch.Tensor) -> torch.Tensor:
    """Logits with a head's columns of o_proj zeroed by hand, in a copy."""
    copied = copy.deepcopy(model)
    copied.blocks[layer].attention.o_proj.weight.data[:, head * 8 : (head + 1) * 8] = 0
    return copied(ids)


@torch.no_grad()
def test_an_ablated_head_is_one_whose_columns_of_o_proj_are_zero(grouped, rows):
    whole = grouped(rows)
    for layer, head in ((0, 0), (0, 3), (1, 2)):
        with heads.ablated(grouped, (layer, head)):
            without = grouped(rows)
        torch.testing.assert_close(without, without_columns(grouped, layer, head, rows))
        assert (without - whole).abs().max() > 1e-3
    assert torch.equal(grouped(rows), whole)  # nothing is left of it


@torch.no_grad()
def test_several_heads_are_ablated_together_and_in_nested_blocks(grouped, rows):
    with heads.ablated(grouped, (0, 1), (1, 1), (1, 2)):
        together = grouped(rows)
    with heads.ablated(grouped, (0, 1)), heads.ablated(grouped, (1, 1), (1, 2)):
        nested = grouped(rows)
    torch.testing.assert_close(together, nested)
    with heads.ablated(grouped):
        nobody = grouped(rows)
    assert torch.equal(grouped(rows), nobody) and not torch.equal(nobody, together)


@torch.no_grad()
def test_ablating_a_head_leaves_the_others_of_its_group_and_its_weights_as_they_were(grouped, rows):
    before = heads.weights_of(grouped, rows)
    with heads.ablated(grouped, (1, 0)):
        after = heads.weights_of(grouped, rows)
    np.testing.assert_array_equal(before, after)  # the last layer's weights don't depend on its own outputs
    outputs = []
    hook = grouped.blocks[1].attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0].clone()))
    grouped(rows)
    hook.remove()
    with heads.ablated(grouped, (1, 0)):
        hook = grouped.blocks[1].attention.o_proj.register_forward_pre_hook(
            lambda _, args: outputs.append(args[0].clone())
        )
        grouped(rows)
        hook.remove()
    assert not outputs[1][..., :8].any()
    torch.testing.assert_close(outputs[0][..., 8:], outputs[1][..., 8:])


@torch.no_grad()
def test_by_the_mean_a_head_says_the_same_everywhere_and_what_it_says_on_average(grouped, rows):
    outputs = []
    listen = grouped.blocks[0].attention.o_proj.register_forward_pre_hook
    hook = listen(lambda _, args: outputs.append(args[0].clone()))
    grouped(rows)
    hook.remove()
    with heads.ablated(grouped, (0, 2), mean_over=rows):
        hook = listen(lambda _, args: outputs.append(args[0].clone()))
        grouped(rows)
        hook.remove()
    whole, ablated = outputs
    torch.testing.assert_close(ablated[..., 16:24], whole[..., 16:24].mean((0, 1)).expand(3, 7, 8))
    torch.testing.assert_close(ablated[..., :16], whole[..., :16])


def test_an_error_inside_the_block_puts_the_head_back(grouped, rows):
    whole = grouped(rows)
    with pytest.raises(RuntimeError, match="stop"), heads.ablated(grouped, (0, 0)):
        raise RuntimeError("stop")
    assert torch.equal(grouped(rows), whole)


@pytest.mark.parametrize("place", [(2, 0), (-1, 0), (0, 4), (0, -1)])
def test_a_head_that_is_not_there_is_refused_and_none_is_ablated(grouped, rows, place):
    whole = grouped(rows)
    with pytest.raises(ConfigError, match="2 layers of 4 heads"), heads.ablated(grouped, (0, 0), place):
        pass
    assert torch.equal(grouped(rows), whole)
    with pytest.raises(ConfigError, match="no attention layer"), heads.ablated(torch.nn.Linear(2, 2), (0, 0)):
        pass


def test_weights_of_gives_every_rows_weights_as_the_model_hands_them_out(grouped, rows):
    weights = heads.weights_of(grouped, rows)
    assert weights.shape == (3, 2, 4, 7, 7)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    alone = heads.weights_of(grouped, rows[1:2])
    np.testing.assert_allclose(alone[0], weights[1], atol=1e-5)
