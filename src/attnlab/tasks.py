"""Small experiments that chapters train in seconds. Each returns what was measured; none asserts."""

import torch
from jaxtyping import Float
from torch import Tensor


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
