"""Small experiments that chapters train in seconds. Each returns what was measured; none asserts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from attnlab import heads
from attnlab.errors import ConfigError
from attnlab.heads import HeadScores
from attnlab.latent import LatentAttention
from attnlab.layers import GroupedQueryAttention, RMSNorm
from attnlab.mistral import Mistral, MistralConfig


def learn_to_look_up(
    scale: float,
    head_dim: int,
    lr: float,
    steps: int = 200,
    seed: int = 0,
    n_keys: int = 32,
    d_model: int = 64,
) -> Float[Tensor, " steps"]:
    """Train one head to fetch the right one of ``n_keys`` values, by plain SGD; the loss of every step.

    The query is the wanted key passed through a fixed random matrix, which the two projections have to undo. Weights start
    with variance 1/d_model, so queries and keys have independent numbers of mean 0 and variance about 1, and
    ``scale`` is what the scores are multiplied by. The loss is the mean squared error of the fetched value (values have
    variance 1): averaging all values, which is knowing nothing, costs about 1; a wrong value with confidence costs 2.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g) * std

    hidden = normal(d_model, d_model, std=d_model**-0.5)
    w_q = normal(d_model, head_dim, std=d_model**-0.5).requires_grad_()
    w_k = normal(d_model, head_dim, std=d_model**-0.5).requires_grad_()
    optimizer = torch.optim.SGD([w_q, w_k], lr=lr)
    batch, losses = 64, []
    for _ in range(steps):
        keys, values = normal(batch, n_keys, d_model), normal(batch, n_keys, 8)
        wanted = torch.randint(n_keys, (batch,), generator=g)
        rows = torch.arange(batch)
        queries = keys[rows, wanted] @ hidden
        scores = torch.einsum("bd,bsd->bs", queries @ w_q, keys @ w_k) * scale  # (batch, n_keys)
        fetched = torch.einsum("bs,bsd->bd", scores.softmax(-1), values)
        loss = (fetched - values[rows, wanted]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# Chapter 4: two layers copy, one can't


class AttentionOnly(nn.Module):
    """Embedding, attention layers that each add to the residual stream, norm, logits: a decoder without feed-forward.

    Called as ``Mistral`` is. Positions are rotary; every layer reads the stream through an ``RMSNorm``.
    """

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in range(n_layers))
        self.layers = nn.ModuleList(GroupedQueryAttention(d_model, n_heads, rope_theta=1e4) for _ in range(n_layers))
        self.norm = RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        last_only: bool = False,
        on_weights: Callable[[int, Tensor], None] | None = None,
    ) -> Float[Tensor, "B T vocab"]:
        """Logits for the token after each position, or the last. ``on_weights(layer, weights)``: each layer's (B, H, T, T)."""
        x = self.embed(ids)  # (B, T, d)
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            if on_weights is None:
                x = x + layer(norm(x))
            else:
                read, weights = layer(norm(x), return_weights=True)
                on_weights(i, weights)
                x = x + read
        return self.lm_head(self.norm(x[:, -1:] if last_only else x))


def repeats(
    n: Int[Tensor, " B"], length: int, generator: torch.Generator, vocab_size: int = 64
) -> Int[Tensor, "B length"]:
    """Rows of a first token 0, then ``n`` different random tokens again and again until the row is full.

    ``length = 1 + 2 * n`` is exactly two copies, as ``heads.induction_on_repeat`` expects them.
    """
    different = torch.rand(len(n), vocab_size - 1, generator=generator).argsort(-1) + 1  # (B, vocab_size - 1)
    copies = different.gather(1, torch.arange(length - 1) % n[:, None])
    return F.pad(copies, (1, 0))


@torch.no_grad()
def second_copy(model: nn.Module, ids: Int[Tensor, "B T"], n: int) -> tuple[float, float]:
    """Accuracy, and loss in nats per token, on the second of two copies of ``n`` tokens behind a first token.

    Its first token doesn't count: nothing foretells it. ``ids`` may be longer (what follows is left out).
    """
    logits = model(ids[:, : 2 * n])[:, n + 1 :].float()  # (B, n - 1, vocab)
    wanted = ids[:, n + 2 : 2 * n + 1]
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return (logits.argmax(-1) == wanted).float().mean().item(), loss.item()


@contextmanager
def reading_the_embedding(model: AttentionOnly, *projections: str) -> Iterator[None]:
    """Within the ``with`` block the last layer's ``projections`` read the embedding alone.

    ``"k_proj"`` asks what the last layer's keys owe to the layers before it; queries and values go on reading the whole
    stream.
    """
    embedded: list[Tensor] = []

    def keep(_: nn.Module, args: tuple, output: Tensor) -> None:
        embedded[:] = [output]

    def replace(_: nn.Module, args: tuple) -> tuple[Tensor]:
        return (model.norms[-1](embedded[0]),)

    with ExitStack() as hooks:
        hooks.enter_context(model.embed.register_forward_hook(keep))
        for name in projections:
            hooks.enter_context(getattr(model.layers[-1], name).register_forward_pre_hook(replace))
        yield


@dataclass(frozen=True)
class Repeating:
    """What ``learn_to_repeat`` measured, at ``steps`` of training: E measurements of L layers with H heads."""

    model: AttentionOnly
    test: Int[Tensor, "B T"]  # rows that were not trained on: two copies of n tokens
    n: int
    steps: list[int]
    accuracy: Float[np.ndarray, " E"]  # on the second copy
    loss: Float[np.ndarray, " E"]  # nats per token there
    previous_token: Float[np.ndarray, "E L H"]  # scores as in ``heads``
    induction: Float[np.ndarray, "E L H"]
    maps: Float[np.ndarray, "E L H T T"]  # the weights on the first test row


def learn_to_repeat(
    n_layers: int,
    lengths: tuple[int, int] = (8, 24),
    steps: int = 240,
    seed: int = 0,
    n_heads: int = 4,
    every: int = 10,
    test_length: int | None = None,
    d_model: int = 64,
) -> Repeating:
    """Train an ``AttentionOnly`` to repeat random sequences, and measure it every ``every`` steps.

    Each row has its own period, drawn from ``lengths``; the loss is on what can be known, from the second token of the
    second copy on. The test is on new rows of two copies of ``test_length`` (the middle of ``lengths``, if not given).
    """
    torch.manual_seed(seed)  # of the weights
    g = torch.Generator().manual_seed(seed)
    low, high = lengths
    n, row_length = test_length or (low + high) // 2, 1 + 2 * high
    model = AttentionOnly(64, d_model, n_layers, n_heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    test = repeats(torch.full((64,), n), 1 + 2 * n, torch.Generator().manual_seed(1000 + seed))
    measured: dict[str, list] = {
        name: [] for name in ("steps", "accuracy", "loss", "previous_token", "induction", "maps")
    }

    def measure(step: int) -> None:
        accuracy, loss = second_copy(model, test, n)
        weights = heads.weights_of(model, test[:16])
        found = {
            "previous_token": HeadScores.pool(heads.previous_token(w) for w in weights).score,
            "induction": HeadScores.pool(heads.induction_on_repeat(w, n) for w in weights).score,
        }
        found |= {"steps": step, "accuracy": accuracy, "loss": loss, "maps": weights[0]}
        for name, value in found.items():
            measured[name].append(value)

    for step in tqdm(range(steps), desc=f"repeating, {n_layers} layers", leave=False, delay=2):
        if step % every == 0:
            measure(step)
        periods = torch.randint(low, high + 1, (64,), generator=g)
        ids = repeats(periods, row_length, g)
        targets = ids[:, 1:].masked_fill(torch.arange(row_length - 1) < 1 + periods[:, None], -100)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measure(steps)
    return Repeating(model, test, n, measured.pop("steps"), **{name: np.array(v) for name, v in measured.items()})


PART = 16  # numbers in each of the three parts of a token of Wishes
PARTS = {name: slice(i * PART, (i + 1) * PART) for i, name in enumerate(("name", "wish", "payload"))}


@dataclass(frozen=True)
class Wishes:
    """Chapter 2's task: each token has a name, a wish and a payload, and is to get the payload of the token it wishes for.

    A token is 3 · 16 numbers. The name is a random direction, drawn anew for every sequence, of length 4. The wish is the
    name of one token of the sequence, the token itself not excluded; every token is wished for once. The payload is one of
    16, a 4 in one of 16 places; in a sequence of 16 tokens each occurs once, so that who cannot look things up is right
    once in 16. A layer answers by the largest number of one part of its output.

    Args:
        slot: the part of the output ("name", "wish", "payload") where the answer is read; the others are free.
        from_asker: the question turned round: fetch the payload of the token that wishes for you.
        hide_self: no token may attend to itself.
        distinct: False draws payloads with repetition. Guessing is then better than 1 in 16, since some occur more often.
    """

    slot: str = "wish"
    from_asker: bool = False
    hide_self: bool = False
    distinct: bool = True

    n_tokens = 16
    d_model = 3 * PART

    def batch(
        self, size: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B T d"], Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Sequences; for each token the position of the token to fetch from; and the payload it has, a number below 16."""
        T = self.n_tokens
        names = F.normalize(torch.randn(size, T, PART, generator=generator), dim=-1) * PART**0.5
        if self.distinct:
            payloads = torch.rand(size, T, generator=generator).argsort(-1)  # a permutation for each sequence
        else:
            payloads = torch.randint(PART, (size, T), generator=generator)
        wished = torch.rand(size, T, generator=generator).argsort(-1)
        rows = torch.arange(size)[:, None]
        x = torch.cat((names, names[rows, wished], F.one_hot(payloads, PART) * PART**0.5), dim=-1)  # (B, T, d)
        wanted = wished.argsort(-1) if self.from_asker else wished  # argsort inverts a permutation
        return x, wanted, payloads[rows, wanted]

    @property
    def mask(self) -> Bool[Tensor, "T T"] | None:
        """What ``hide_self`` makes of the mask; None: all may be seen."""
        return ~torch.eye(self.n_tokens, dtype=torch.bool) if self.hide_self else None

    def learn(
        self, layer: GroupedQueryAttention, seed: int = 0, steps: int = 400, lr: float = 0.01
    ) -> Float[Tensor, " steps"]:
        """Train, by Adam, the projections of ``layer`` that require a gradient; the cross-entropy of every step."""
        generator, losses = torch.Generator().manual_seed(seed), []
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr)
        for _ in tqdm(range(steps), desc="learning to grant wishes", leave=False, delay=2):
            x, _, answers = self.batch(64, generator)
            logits = layer(x, mask=self.mask)[..., PARTS[self.slot]]
            loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    @torch.no_grad()
    def score(self, layer: GroupedQueryAttention) -> tuple[float, float]:
        """On 256 fresh sequences, the share of tokens that look where they should, and the share that answer right.

        To look somewhere is to give it the largest weight, the mean over the heads.
        """
        x, wanted, answers = self.batch(256, torch.Generator().manual_seed(1_000_000))
        out, weights = layer(x, mask=self.mask, return_weights=True)
        found = weights.mean(1).argmax(-1) == wanted
        answered = out[..., PARTS[self.slot]].argmax(-1) == answers
        return found.float().mean().item(), answered.float().mean().item()

    def new_layer(
        self, head_dim: int, seed: int = 0, *, learned: str = "qkvo", sign: int = 0, shared: bool = False
    ) -> GroupedQueryAttention:
        """A layer of one head that sees everything, to be trained on this task.

        Args:
            learned: the projections to be trained; the others are the identity, which needs ``head_dim`` 48, and stay it.
            sign: +1 (-1) turns W_Q and W_O round where it takes that to start with a positive (negative) sum along the
                diagonals that the task needs: wish against name in W_Qᵀ W_K, payload to wish in W_O W_V. 0: as drawn.
            shared: one matrix is both W_Q and W_K.

        Raises ConfigError for an identity between sizes that differ.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = GroupedQueryAttention(self.d_model, n_heads=1, head_dim=head_dim, causal=False)
        if set(learned) != set("qkvo") and head_dim != self.d_model:
            raise ConfigError(
                f"a projection that isn't learned is the identity: head_dim must be {self.d_model}; got {head_dim}"
            )
        q, k, v, o = (p.weight.detach() for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
        if sign:
            asker, asked = ("name", "wish") if self.from_asker else ("wish", "name")
            q *= sign * (q.T @ k)[PARTS[asker], PARTS[asked]].trace().sign()
            o *= sign * (o @ v)[PARTS[self.slot], PARTS["payload"]].trace().sign()
        for letter in set("qkvo") - set(learned):
            weight = layer.get_submodule(f"{letter}_proj").weight.requires_grad_(False)
            weight.copy_(torch.eye(self.d_model))
        if shared:
            layer.k_proj.weight = layer.q_proj.weight
        return layer


# Chapter 3: many heads fetch many things


@dataclass(frozen=True)
class Fetched:
    """What ``learn_to_fetch`` measured, on sequences that were not trained on."""

    accuracy: Float[np.ndarray, " n_wanted"]  # share of right values, for each of the wanted things
    share: Float[np.ndarray, "H n_wanted"]  # weight that a head puts on the place of each wanted thing, mean
    n_parameters: int
    layer: GroupedQueryAttention | LatentAttention


def learn_to_fetch(
    n_heads: int,
    n_wanted: int,
    head_dim: int | None = None,
    *,
    steps: int = 600,
    seed: int = 0,
    lr: float = 0.01,
    d_model: int = 64,
    n_keys: int = 32,
    n_values: int = 16,
    n_kv_heads: int | None = None,
    n_tables: int = 1,
    d_latent: int | None = None,
) -> Fetched:
    """Train one attention layer in which every token needs ``n_wanted`` things from as many places at once.

    A sequence holds each of ``n_keys`` keys once, in random order, each with a random one of ``n_values`` values. Every
    token also carries ``n_wanted`` wishes, each a key drawn at random, and has to tell the values at those keys, first
    wish first. A token's vector is the sum of learned embeddings for key, value and each wish. The layer sees all places
    (no causal mask) and one matrix reads all answers off its output; there is no residual connection, no feed-forward
    layer and no position. Chance is 1 / n_values.

    Args:
        head_dim: d_model / n_heads if not given: then the number of heads changes neither parameters nor products.
        n_kv_heads: key/value heads that the ``n_heads`` query heads share; as many as those if not given.
        n_tables: 1, or ``n_wanted``. Then a place holds a key and a value of each of that many tables, their keys in
            an order of their own, and the first wish is looked up in the first table, the second in the second.
        d_latent: numbers of a latent from which every head makes its keys and values (chapter 15); not with ``n_kv_heads``.

    Raises ConfigError for another number of tables, or a latent together with ``n_kv_heads``.
    """
    if n_tables not in (1, n_wanted):
        raise ConfigError(f"n_tables is 1 or n_wanted={n_wanted}, a table for each wish; got {n_tables}")
    if d_latent is not None and n_kv_heads is not None:
        raise ConfigError(f"a latent is shared by all heads: leave n_kv_heads out; got {n_kv_heads}")
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=g) * std)

    key = normal(n_tables, n_keys, d_model, std=n_tables**-0.5)
    value = normal(n_tables, n_values, d_model, std=n_tables**-0.5)
    wish = normal(n_wanted, n_keys, d_model, std=n_wanted**-0.5)
    if d_latent is None:
        layer = GroupedQueryAttention(d_model, n_heads, n_kv_heads, head_dim, causal=False)
    else:
        layer = LatentAttention(d_model, n_heads, d_latent, 0, head_dim, causal=False)
    read = nn.Linear(d_model, n_wanted * n_values, bias=False)
    matrices = [*layer.parameters(), *read.parameters()]
    for matrix in (m for m in matrices if m.dim() == 2):  # not a gain, which starts at 1
        nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5, generator=g)
    parameters = [key, value, wish, *matrices]
    optimizer = torch.optim.Adam(parameters, lr=lr)

    def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens' vectors (B, T, d), the places of what they want (B, T, n_wanted), and the values there."""
        keys = torch.rand(batch, n_tables, n_keys, generator=g).argsort(-1)  # (B, n_tables, T)
        values = torch.randint(n_values, (batch, n_tables, n_keys), generator=g)  # (B, n_tables, T)
        wishes = torch.randint(n_keys, (batch, n_keys, n_wanted), generator=g)  # (B, T, n_wanted), as keys
        places = _for_each_token(keys.argsort(-1), wishes)  # argsort of a permutation is its inverse: key to place
        table = torch.arange(n_tables)[:, None]
        x = key[table, keys].sum(1) + value[table, values].sum(1) + wish[torch.arange(n_wanted), wishes].sum(2)
        return x, places, _for_each_token(values, places)  # x: (B, T, d)

    for _ in tqdm(range(steps), desc=f"fetching, {n_heads} heads", leave=False, delay=2):
        x, _, right = draw(16)
        logits = read(layer(x)).unflatten(-1, (n_wanted, n_values))
        loss = F.cross_entropy(logits.flatten(0, 2), right.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        x, places, right = draw(64)
        out, weights = layer(x, return_weights=True)  # weights: (B, H, T, S)
        told = read(out).unflatten(-1, (n_wanted, n_values)).argmax(-1)
        share = weights.gather(3, places[:, None].expand(-1, n_heads, -1, -1)).mean((0, 2))  # (H, n_wanted)
        accuracy = (told == right).float().mean((0, 1))
    return Fetched(accuracy.numpy(), share.numpy(), sum(p.numel() for p in parameters), layer)


def _for_each_token(rows: Int[Tensor, "B n S"], index: Int[Tensor, "B T m"]) -> Int[Tensor, "B T m"]:
    """``rows[b, i, index[b, t, i]]``; with n = 1 every i reads the one row."""
    index = index.transpose(1, 2)  # (B, m, T)
    return rows.expand(-1, index.shape[1], -1).gather(2, index).transpose(1, 2)


# Chapter 10: how far information is handed on


PAYLOADS = 8  # tokens that may have to be told; as many others are filler


def learn_to_relay(
    n_layers: int, window: int = 5, longest: int = 15, steps: int = 150, seed: int = 0
) -> Float[np.ndarray, " longest"]:
    """Train a small ``Mistral`` with a window to tell, at the last token, the one payload that stood before it.

    The payload stands 1 to ``longest`` tokens back, each as often, and filler everywhere else. The result is the accuracy
    on new rows for each of these distances; guessing gets 1 in ``PAYLOADS``. Nothing but the window stands in the way: from
    further back than ``window - 1`` tokens a payload has to be handed on from layer to layer.

    Raises ConfigError for a distance below 1, and as ``MistralConfig`` does.
    """
    if longest < 1:
        raise ConfigError(f"a payload stands 1 or more tokens back; got longest={longest}")
    torch.manual_seed(seed)  # of the weights
    g = torch.Generator().manual_seed(seed)
    config = MistralConfig(
        vocab_size=2 * PAYLOADS, d_model=32, n_layers=n_layers, n_heads=4, n_kv_heads=4, d_ff=64, window=window
    )
    model = Mistral(config)

    def rows(distances: Int[Tensor, " B"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
        B = len(distances)
        ids = torch.randint(PAYLOADS, 2 * PAYLOADS, (B, longest + 1), generator=g)
        payloads = torch.randint(PAYLOADS, (B,), generator=g)
        ids[torch.arange(B), longest - distances] = payloads
        return ids, payloads

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in tqdm(range(steps), desc=f"relaying, {n_layers} layers", leave=False, delay=2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        ids, payloads = rows(torch.randint(1, longest + 1, (64,), generator=g))
        loss = F.cross_entropy(model(ids, last_only=True)[:, 0], payloads)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    accuracy = []
    with torch.no_grad():
        for distance in range(1, longest + 1):
            ids, payloads = rows(torch.full((400,), distance))
            accuracy.append((model(ids, last_only=True)[:, 0].argmax(-1) == payloads).float().mean().item())
    return np.array(accuracy)
