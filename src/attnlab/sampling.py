"""Choosing the next token from the model's logits."""

import math
from collections import Counter
from collections.abc import Iterable
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.errors import ConfigError, ShapeError


class Sampler:
    """One conversation's way of choosing, with a memory of what it has chosen: ``sampler(logits)`` gives an id.

    Args:
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: of the likeliest tokens that together have this probability (Holtzman et al. 2019, arXiv 1904.09751).
        top_k: of the ``top_k`` likeliest (Fan et al. 2018, arXiv 1805.04833). None: of all.
        repetition_penalty: logits of ids that stood in the prompt or were chosen are divided by it where they are positive,
            multiplied where they are negative (Keskar et al. 2019, arXiv 1909.05858). 1 changes nothing.
        frequency_penalty, presence_penalty: taken off a chosen id's logit, once for each time it was chosen, and once if it
            was chosen at all (the two fields of OpenAI's API). 0 changes nothing.
        seed: same seed, same choices, whatever else uses random numbers. None: others every time.
        prompt_ids: what ``repetition_penalty`` counts as said before.

    Raises ConfigError for a value outside its range; when called, ShapeError for anything but the logits of one position, and
    ConfigError for logits that are not finite.

    >>> Sampler()(torch.tensor([0.1, 2.0, 1.0]))
    1
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int | None = None,
        prompt_ids: Iterable[int] = (),
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature must be 0 (the likeliest token) or more; got {temperature}")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p is a probability above 0 and at most 1; got {top_p}")
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k is a number of tokens, 1 or more; got {top_k}")
        if not 0 < repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0 (1 changes nothing); got {repetition_penalty}")
        for name, penalty in {"frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty}.items():
            if not -math.inf < penalty < math.inf:
                raise ConfigError(f"{name} is a finite number (0 changes nothing); got {penalty}")
        if seed is not None and not (isinstance(seed, Integral) and -(2**63) <= seed < 2**64):
            raise ConfigError(f"seed is a whole number of at most 64 bits, or None; got {seed!r}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.repetition_penalty = repetition_penalty
        self.frequency_penalty, self.presence_penalty = frequency_penalty, presence_penalty
        self.said = set(prompt_ids) if repetition_penalty != 1 else set()
        self.chosen = Counter()
        self.generator = torch.Generator()  # on the CPU, and nobody else's
        self.generator.seed() if seed is None else self.generator.manual_seed(int(seed))

    def __call__(self, logits: Float[Tensor, " vocab"]) -> int:
        if logits.dim() != 1 or len(logits) == 0:
            raise ShapeError(f"expected the logits of one position, (vocab,); got {tuple(logits.shape)}")
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise ConfigError("the model's logits are not finite: load it in bfloat16 or float32, or mend its weights")
        id = self._draw(self._penalised(logits))
        self.chosen[id] += 1
        if self.repetition_penalty != 1:
            self.said.add(id)
        return id

    def _penalised(self, logits: Tensor) -> Tensor:
        said = torch.tensor([id for id in self.said if id < len(logits)], dtype=torch.long)
        if len(said):
            logits = logits.clone()
            before = logits[said]
            logits[said] = torch.where(before > 0, before / self.repetition_penalty, before * self.repetition_penalty)
        if self.chosen and (self.frequency_penalty or self.presence_penalty):
            logits = logits.clone()
            ids, counts = torch.tensor(list(self.chosen)), torch.tensor(list(self.chosen.values()))
            logits[ids] -= counts * self.frequency_penalty + self.presence_penalty
        return logits

    def _draw(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        if self.top_k is not None and self.top_k < len(logits):
            least = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < least, -math.inf)
        temperature = max(self.temperature, 1e-30)  # what is smaller would be 0 in float32; the likeliest, all the same
        probabilities = ((logits - logits.max()) / temperature).softmax(-1)  # the maximum first: no overflow near 0
        if self.top_p < 1:
            likeliest, ids = probabilities.sort(descending=True, stable=True)
            keep = likeliest.cumsum(-1) - likeliest < self.top_p  # also the one that reaches it
            probabilities = torch.zeros_like(probabilities).scatter(0, ids[keep], likeliest[keep])
        return int(torch.multinomial(probabilities, 1, generator=self.generator))
