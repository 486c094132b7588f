"""Quality claims, checked: EleutherAI's evaluation harness (``lm-eval``) on any model that ``attnlab.load`` can load.

``python -m attnlab.evaluation`` is the harness's own command line with one model more, ``attnlab``::

    python -m attnlab.evaluation --model attnlab --model_args name=companion,max_length=256 --tasks ...

From Python, ``lm_eval.simple_evaluate(model=harness_model()(lm), tasks=...)``. The harness brings tasks, prompts and scores; what is
ours is below: how likely a model finds given tokens. Needs ``pip install "lm-eval==0.4.13"``; importing this module does not.

Source of the definitions: the harness's ``lm_eval/api/model.py``, and ``lm_eval/models/huggingface.py`` for what that leaves open
(texts begin with ``<s>``; what is too long loses its beginning), so that scores compare with its ``--model hf``.
"""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tqdm import tqdm

from attnlab.errors import AttnlabError, ConfigError
from attnlab.generate import TextStream, stream
from attnlab.loading import LanguageModel, load
from attnlab.mistral import Mistral

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, and of what follows it


@torch.inference_mode()
def loglikelihoods(
    model: Mistral, pairs: Sequence[Pair], batch_size: int = 1, max_length: int = 4096, progress: bool = False
) -> list[tuple[float, bool]]:
    """For every pair: nats of the second ids after the first (at most 0), and whether greedy decoding would give them.

    Args:
        batch_size: pairs a pass. Their lengths may differ: shorter rows are filled up behind, where a causal model
            does not look.
        max_length: tokens that a pass may take in; a longer pair loses its beginning.

    Raises ConfigError for an empty context or a continuation that is empty or longer than max_length.
    """
    for context, continuation in pairs:
        if not context or not 1 <= len(continuation) <= max_length:
            raise ConfigError(
                f"expected a context of 1 token or more and 1 to {max_length} tokens after it; got {len(context)} and "
                f"{len(continuation)}: raise max_length, or cut the text"
            )
    rows = [[*context, *continuation][-max_length - 1 :] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # what takes most memory first, and little to fill up
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    bar = tqdm(total=len(rows), desc="scoring", leave=False, delay=2, disable=not progress)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        ids = torch.zeros(len(some), len(rows[some[0]]) - 1, dtype=torch.long)
        for j, i in enumerate(some):
            ids[j, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
        logits = model(ids.to(model.device))  # (B, T, vocab)
        for j, i in enumerate(some):
            wanted = torch.tensor(pairs[i][1], device=logits.device)  # (n,)
            stop = len(rows[i]) - 1
            scores = logits[j, stop - len(wanted) : stop].float()  # (n, vocab)
            nats = scores.log_softmax(-1).gather(-1, wanted[:, None]).sum()
            found[i] = nats.item(), bool((scores.argmax(-1) == wanted).all())
        bar.update(len(some))
    bar.close()
    return found


def answer(
    lm: LanguageModel,
    prompt: str,
    until: Sequence[str] = (),
    max_new_tokens: int = 256,
    max_length: int = 4096,
    **sampling: Any,
) -> str:
    """What follows ``prompt``, up to the first of ``until`` and without it; ``sampling`` goes to ``stream``.

    A prompt that leaves no room for the answer in ``max_length`` loses its beginning. Raises ConfigError where there is no room
    for any prompt.
    """
    room = max_length - max_new_tokens
    if room < 1:
        raise ConfigError(f"max_length={max_length} leaves no room for a prompt beside {max_new_tokens} new tokens")
    text, pieces = "", TextStream(lm.tokenizer, begins=False)
    for id in stream(lm, lm.tokenizer.encode(prompt)[-room:], max_new_tokens, **sampling):
        text += pieces.push(id)
        if any(mark in text for mark in until if mark):
            break
    text += pieces.finish()
    for mark in filter(None, until):
        text = text.split(mark)[0]
    return text


@cache
def harness_model() -> type:
    """The harness's class of model over attnlab's, which it also knows as ``attnlab`` once this was called.

    Its arguments: ``lm``, a loaded model, or ``name`` and whatever else ``attnlab.load`` takes; ``batch_size``; ``max_length``, the
    tokens that the model may see at once. Raises ConfigError if the harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise ConfigError(
            f'the evaluation harness is not installed ({error}): pip install "lm-eval==0.4.13"'
        ) from error

    @register_model("attnlab")
    class HarnessModel(TemplateLM):
        def __init__(
            self,
            lm: LanguageModel | None = None,
            name: str = "companion",
            batch_size: int | str = 1,
            max_length: int = 4096,
            max_batch_size: int | None = None,  # the harness's command line always gives it; it is for "auto"
            **options: Any,
        ) -> None:
            super().__init__()
            if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_length < 2:
                raise ConfigError(
                    f"expected a batch_size of 1 or more and a max_length of 2 or more; got {batch_size!r} and {max_length}"
                )
            self.lm = load(name, **options) if lm is None else lm
            self.batch_size, self.max_length = int(batch_size), max_length
            self._device = self.lm.model.device

        @property
        def eot_token_id(self) -> int:
            return self.lm.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return self.lm.tokenizer.bos_id

        @property
        def tokenizer_name(self) -> str:
            return self.lm.name.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return self.lm.tokenizer.encode(string, bos=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any):
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = loglikelihoods(self.lm.model, pairs, self.batch_size, self.max_length, not disable_tqdm)
            for (texts, _, _), result in zip(requests, found, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            """Each text in windows of ``max_length`` tokens, the first behind ``<s>``, the next behind one token of the last."""
            windows, of_text = [], []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
                new = [make_disjoint_window(pair) for pair in cut]
                windows += new
                of_text += [i] * len(new)
            found = loglikelihoods(self.lm.model, windows, self.batch_size, self.max_length, not disable_tqdm)
            totals = [0.0] * len(requests)
            for i, (nats, _) in zip(of_text, found, strict=True):
                totals[i] += nats
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            """One by one: rows end at different places, and a decode step is quick beside the prompt."""
            texts = []
            for request in tqdm(requests, desc="answering", leave=False, delay=2, disable=disable_tqdm):
                prompt, asked = request.args
                options = normalize_gen_kwargs(asked, default_max_gen_toks=256)
                until, n = options.pop("until", None) or [], options.pop("max_gen_toks")
                options.pop("do_sample", None)  # the harness has set temperature to 0 where it is false
                if unknown := options.keys() - {"temperature", "top_p", "seed"}:
                    raise ConfigError(
                        f"this task asks for {', '.join(sorted(unknown))}, which attnlab has not: it samples by "
                        "temperature, top_p and seed; --gen_kwargs replaces what the task asks for"
                    )
                until = [until] if isinstance(until, str) else until
                text = answer(self.lm, prompt, until, n, self.max_length, **options)
                self.cache_hook.add_partial("generate_until", request.args, text)
                texts.append(text)
            return texts

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            raise ConfigError(
                "the harness puts a template's marks into the text, and attnlab reads text as text: [INST] would not "
                "become the token it stands for. Run without --apply_chat_template"
            )

    return HarnessModel


def main() -> None:
    """The harness's command line, which then knows the model ``attnlab``."""
    try:
        harness_model()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except AttnlabError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
