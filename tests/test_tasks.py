"""The small experiments: what they are made of is as said, and the effect that each is there for appears at toy size."""

import numpy as np
import pytest
import torch

from attnlab import tasks
from attnlab.attention import scaled_dot_product_attention
from attnlab.errors import ConfigError
from attnlab.layers import GroupedQueryAttention

# Wishes (chapter 2)

NAME, WISH, PAYLOAD = (tasks.PARTS[part] for part in ("name", "wish", "payload"))


def hand_made_head(sign: float = 1.0) -> GroupedQueryAttention:
    layer = tasks.Wishes().new_layer(head_dim=16)
    for module, rows, columns in (
        (layer.q_proj, slice(None), WISH),
        (layer.k_proj, slice(None), NAME),
        (layer.v_proj, slice(None), PAYLOAD),
        (layer.o_proj, WISH, slice(None)),
    ):
        module.weight.data.zero_()
        module.weight.data[rows, columns] = torch.eye(16)
    layer.q_proj.weight.data *= sign
    layer.o_proj.weight.data *= sign
    return layer


def test_a_wish_is_the_name_of_the_wanted_token_and_the_answer_is_its_payload():
    x, wanted, answers = tasks.Wishes().batch(20, torch.Generator().manual_seed(0))
    rows = torch.arange(20)[:, None]
    assert torch.equal(x[..., WISH], x[..., NAME][rows, wanted])
    assert torch.equal(x[..., PAYLOAD][rows, wanted].argmax(-1), answers)
    assert all(sorted(row) == list(range(16)) for row in wanted.tolist())  # each is wished for once
    assert all(sorted(row) == list(range(16)) for row in answers.tolist())  # each payload occurs once
    for part in (NAME, WISH, PAYLOAD):
        torch.testing.assert_close(x[..., part].norm(dim=-1), torch.full((20, 16), 4.0))


def test_the_turned_question_wants_the_token_that_wishes():
    asked, turned = (
        tasks.Wishes(from_asker=turned).batch(5, torch.Generator().manual_seed(0)) for turned in (False, True)
    )
    assert torch.equal(asked[0], turned[0])  # the same tokens
    assert torch.equal(asked[1].gather(1, turned[1]), torch.arange(16).expand(5, 16))


def test_payloads_repeat_only_where_that_is_asked_for():
    _, _, answers = tasks.Wishes(distinct=False).batch(50, torch.Generator().manual_seed(0))
    assert any(len(set(row)) < 16 for row in answers.tolist())


def test_a_head_made_by_hand_finds_and_answers_everything():
    assert tasks.Wishes().score(hand_made_head()) == (1.0, 1.0)
    assert tasks.Wishes(slot="payload").score(hand_made_head())[1] < 0.2
    found, answered = tasks.Wishes(hide_self=True).score(hand_made_head())
    assert 0.85 < found < 1 and 0.85 < answered < 1  # who wishes for itself cannot


def test_a_head_that_looks_away_answers_without_finding():
    assert tasks.Wishes().score(hand_made_head(sign=-1.0)) == (0.0, 1.0)
    assert tasks.Wishes(distinct=False).score(hand_made_head(sign=-1.0))[1] < 0.9


def test_without_projections_it_is_bare_attention_and_chance():
    layer = tasks.Wishes().new_layer(head_dim=48, learned="")
    x = torch.randn(2, 16, 48)
    bare = scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
    torch.testing.assert_close(layer(x), bare)
    assert not any(p.requires_grad for p in layer.parameters())
    for slot in tasks.PARTS:
        assert abs(tasks.Wishes(slot=slot).score(layer)[1] - 1 / 16) < 0.03


def test_what_is_not_learned_stays_the_identity():
    layer = tasks.Wishes().new_layer(head_dim=48, learned="qk")
    before = layer.q_proj.weight.detach().clone()
    losses = tasks.Wishes(slot="payload").learn(layer, steps=3)
    assert losses.shape == (3,) and losses.isfinite().all()
    assert torch.equal(layer.v_proj.weight, torch.eye(48)) and torch.equal(layer.o_proj.weight, torch.eye(48))
    assert not torch.equal(layer.q_proj.weight, before)


def test_a_head_learns_to_fetch_what_it_wishes_for_with_either_sign():
    for sign in (1, -1):
        layer = tasks.Wishes().new_layer(head_dim=16, sign=sign)
        tasks.Wishes().learn(layer, steps=300)
        found, answered = tasks.Wishes().score(layer)
        assert answered > 0.9 and (found > 0.9 if sign == 1 else found < 0.1)


def test_one_matrix_for_queries_and_keys_stays_one_and_answers_less_than_half():
    layer = tasks.Wishes().new_layer(head_dim=16, shared=True)
    tasks.Wishes().learn(layer, steps=300)
    assert torch.equal(layer.q_proj.weight, layer.k_proj.weight)
    assert tasks.Wishes().score(layer)[1] < 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_the_start_is_that_of_both_diagonals(sign):
    for seed in range(4):
        layer = tasks.Wishes().new_layer(head_dim=4, seed=seed, sign=sign)
        q, k, v, o = (m.weight for m in layer.children())
        assert (q.T @ k)[WISH, NAME].trace().sign() == (o @ v)[WISH, PAYLOAD].trace().sign() == sign
        as_drawn = tasks.Wishes().new_layer(head_dim=4, seed=seed)
        torch.testing.assert_close(q.abs(), as_drawn.q_proj.weight.abs())


def test_a_new_layer_is_seeded_and_leaves_torch_as_it_was():
    state = torch.random.get_rng_state()
    first, same, other = (tasks.Wishes().new_layer(8, seed).q_proj.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_identity_between_sizes_that_differ_is_an_error():
    with pytest.raises(ConfigError, match="head_dim must be 48; got 16"):
        tasks.Wishes().new_layer(head_dim=16, learned="qk")


# learn_to_fetch (chapter 3)

TOY = {"n_keys": 8, "n_values": 4, "d_model": 32, "steps": 250}


def test_a_token_is_told_the_values_at_the_places_it_wants():
    rows = torch.tensor([[[5, 6, 7]], [[1, 2, 3]]])  # one table
    index = torch.tensor([[[2, 0]], [[1, 1]]])
    assert tasks._for_each_token(rows, index).tolist() == [[[7, 5]], [[2, 2]]]
    two_tables = torch.tensor([[[5, 6, 7], [50, 60, 70]]])
    assert tasks._for_each_token(two_tables, torch.tensor([[[2, 0], [1, 1]]])).tolist() == [[[7, 50], [6, 60]]]


def test_n_heads_changes_no_parameters_and_head_dim_does():
    sizes = {h: tasks.learn_to_fetch(h, 2, **TOY | {"steps": 1}).n_parameters for h in (1, 4, 32)}
    assert len(set(sizes.values())) == 1
    assert tasks.learn_to_fetch(4, 2, head_dim=4, **TOY | {"steps": 1}).n_parameters == sizes[4] - 4 * 32 * 16


def test_one_head_fetches_one_thing_and_two_heads_two():
    one, both, two = (tasks.learn_to_fetch(h, m, **TOY) for h, m in ((1, 1), (1, 2), (2, 2)))
    assert one.accuracy.min() > 0.9 and two.accuracy.min() > 0.9
    assert both.accuracy.mean() < 0.8
    assert both.share.shape == (1, 2) and two.share.shape == (2, 2)
    assert one.share.min() > 0.5
    # each head has its own thing; "own" is not the same one for both
    assert set(two.share.argmax(1)) == {0, 1}


def test_a_head_of_one_number_cannot_pick_out_most_places():
    assert tasks.learn_to_fetch(1, 1, head_dim=1, **TOY).accuracy.mean() < 0.75


def test_fetching_is_seeded():
    first, same, other = (tasks.learn_to_fetch(2, 2, seed=seed, **TOY | {"steps": 5}) for seed in (1, 1, 2))
    assert np.array_equal(first.share, same.share) and not np.array_equal(first.share, other.share)


# learn_to_fetch with shared keys and values (chapter 6)


def test_one_kv_head_serves_one_table_as_well_as_four_do_and_fails_at_two_tables():
    how = TOY | {"n_heads": 4, "head_dim": 4, "n_wanted": 2, "steps": 500}
    alone, shared = (tasks.learn_to_fetch(n_kv_heads=n, n_tables=2, **how).accuracy for n in (4, 1))
    assert alone.min() > 0.9 and shared.max() > 0.9 > 0.8 > shared.min()
    assert tasks.learn_to_fetch(n_kv_heads=1, n_tables=1, **how).accuracy.min() > 0.9


def test_sharing_takes_parameters_from_keys_and_values_alone():
    how = TOY | {"n_heads": 4, "head_dim": 8, "n_wanted": 2, "steps": 1}
    apart, shared = (tasks.learn_to_fetch(n_kv_heads=n, **how).n_parameters for n in (4, 1))
    assert apart - shared == 2 * 3 * 8 * 32
    tables = [tasks.learn_to_fetch(n_tables=n, **how).n_parameters for n in (1, 2)]
    assert tables[1] - tables[0] == (8 + 4) * 32  # the second table's keys and values


def test_heads_fetch_from_two_tables_out_of_a_latent_and_only_its_own_matrices_differ_in_number():
    how = TOY | {"n_heads": 4, "head_dim": 4, "n_wanted": 2, "n_tables": 2}
    fetched = tasks.learn_to_fetch(d_latent=16, **how | {"steps": 500})
    assert fetched.accuracy.min() > 0.9 and fetched.share.shape == (4, 2)
    plain = tasks.learn_to_fetch(**how | {"steps": 1})
    made_of_x, made_of_a_latent = 2 * 32 * 16, 32 * 16 + 2 * 16 * 16 + 16  # W_K, W_V; down, up twice, gain
    assert fetched.n_parameters - plain.n_parameters == made_of_a_latent - made_of_x
    with pytest.raises(ConfigError, match="leave n_kv_heads out; got 2"):
        tasks.learn_to_fetch(d_latent=16, n_kv_heads=2, **how)


def test_tables_are_one_or_as_many_as_wishes():
    with pytest.raises(ConfigError, match="n_tables is 1 or n_wanted=4"):
        tasks.learn_to_fetch(4, 4, n_tables=2, **TOY)


# learn_to_repeat (chapter 4)


def test_repeats_are_a_first_token_and_then_copies_of_different_tokens():
    g = torch.Generator().manual_seed(0)
    ids = tasks.repeats(torch.tensor([5, 3, 12]), 12, g)
    assert ids.shape == (3, 12) and not ids[:, 0].any() and ids[:, 1:].min() > 0
    for row, n in zip(ids, (5, 3, 12), strict=True):
        assert len(set(row[1:].tolist())) == min(n, 11)
        assert torch.equal(row[1 : 12 - n], row[1 + n :])


def test_second_copy_counts_what_can_be_known_and_nothing_else():
    ids = tasks.repeats(torch.tensor([6, 6]), 13, torch.Generator().manual_seed(1))

    def knowing(ids):
        """Right wherever the token stood before, sure of token 0 elsewhere."""
        logits = torch.zeros(*ids.shape, 64)
        for row, tokens in enumerate(ids.tolist()):
            for t, token in enumerate(tokens):
                earlier = tokens.index(token)
                logits[row, t, tokens[earlier + 1] if earlier < t else 0] = 50
        return logits

    accuracy, loss = tasks.second_copy(knowing, ids, 6)
    assert accuracy == 1 and loss < 1e-6
    assert tasks.second_copy(knowing, torch.cat([ids, ids], 1), 6) == (accuracy, loss)  # what follows is left out
    nothing = tasks.second_copy(lambda ids: torch.zeros(*ids.shape, 64), ids, 6)
    assert nothing == (0, pytest.approx(np.log(64), abs=1e-4))


def test_attention_only_is_embedding_layers_that_add_norm_and_logits():
    torch.manual_seed(0)
    model = tasks.AttentionOnly(vocab_size=20, d_model=16, n_layers=2, n_heads=2)
    ids = torch.randint(20, (3, 6))
    x = model.embed(ids)
    for norm, layer in zip(model.norms, model.layers, strict=True):
        x = x + layer(norm(x))
    weights = []
    logits = model(ids, on_weights=lambda i, w: weights.append((i, w)))
    torch.testing.assert_close(logits, model.lm_head(model.norm(x)))
    torch.testing.assert_close(logits, model(ids))
    assert [i for i, _ in weights] == [0, 1] and weights[0][1].shape == (3, 2, 6, 6)


@torch.no_grad()
def test_reading_the_embedding_hides_earlier_layers_from_the_named_projections_only():
    torch.manual_seed(0)
    model = tasks.AttentionOnly(vocab_size=20, d_model=16, n_layers=2, n_heads=2)
    ids = torch.randint(20, (3, 6))
    whole = model(ids)
    x = model.embed(ids)
    read = model.norms[1](x)  # what the last layer would read if the first had written nothing
    projections = ("q_proj", "k_proj", "v_proj")
    seen = {}
    hooks = [
        getattr(model.layers[1], name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: args[0]})
        )
        for name in projections
    ]
    for hidden in projections:
        with tasks.reading_the_embedding(model, hidden):
            assert (model(ids) - whole).abs().max() > 1e-4
        for name in projections:
            assert torch.allclose(seen[name], read) == (name == hidden)
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(ids), whole)
    x = x + model.layers[0](model.norms[0](x))
    expected = model.lm_head(model.norm(x + model.layers[1](read)))
    with tasks.reading_the_embedding(model, *projections):
        torch.testing.assert_close(model(ids), expected)


SHORT = {"lengths": (4, 8), "steps": 160, "every": 40, "n_heads": 2}


def test_two_layers_learn_to_repeat_by_previous_token_and_induction_heads_and_one_layer_does_not():
    two, one = tasks.learn_to_repeat(2, **SHORT), tasks.learn_to_repeat(1, **SHORT)
    assert two.steps == [0, 40, 80, 120, 160] and two.n == 6 and two.test.shape == (64, 13)
    assert two.accuracy[0] < 0.2 and two.accuracy[-1] > 0.9 and one.accuracy[-1] < 0.75
    assert two.loss[-1] < 0.3 < one.loss[-1]
    assert two.induction.shape == two.previous_token.shape == (5, 2, 2) and two.maps.shape == (5, 2, 2, 13, 13)
    assert two.induction[-1, 1].max() > 0.7 and two.previous_token[-1, 0].max() > 0.25
    with tasks.reading_the_embedding(two.model, "k_proj"):
        assert tasks.second_copy(two.model, two.test, two.n)[0] < 0.5


def test_one_period_teaches_a_distance_and_no_induction():
    run = tasks.learn_to_repeat(1, lengths=(8, 8), steps=120, every=120)
    other = tasks.repeats(torch.full((64,), 6), 13, torch.Generator().manual_seed(3))
    assert run.accuracy[-1] > 0.6 and tasks.second_copy(run.model, other, 6)[0] < 0.4


def test_repeating_is_seeded():
    first, same, other = (tasks.learn_to_repeat(1, seed=seed, **SHORT | {"steps": 3}) for seed in (1, 1, 2))
    assert np.array_equal(first.maps, same.maps) and not np.array_equal(first.maps, other.maps)


# Relaying (chapter 10)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_payload_is_told_as_far_back_as_the_layers_reach_and_no_further(n_layers):
    window = 4
    accuracy = tasks.learn_to_relay(n_layers, window, longest=8)
    reach = n_layers * (window - 1)
    assert accuracy[:reach].min() > 0.9 and accuracy[reach:].max() < 0.3


def test_relaying_is_seeded():
    assert np.array_equal(tasks.learn_to_relay(1, 3, 4, steps=3), tasks.learn_to_relay(1, 3, 4, steps=3))


def test_a_payload_stands_before_the_last_token():
    with pytest.raises(ConfigError, match="1 or more tokens back"):
        tasks.learn_to_relay(1, longest=0)
