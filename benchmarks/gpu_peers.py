"""The peers that gpu.py measures beside attnlab, over the very same weights: transformers, and gpt-fast where there is one."""

import importlib
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import timed, wait
from gpu_tools import Setting, random_ids

from attnlab.checkpoint import stored_name
from attnlab.mistral import Mistral
from attnlab.rotary import halves_to_interleaved


def logit_difference(model: Mistral, theirs: Callable[[torch.Tensor], torch.Tensor], s: Setting) -> float:
    """The largest between our logits and a peer's, over their standard deviation: are they the same model?"""
    ids = random_ids(s, s.few_contexts[0])
    with torch.inference_mode():
        ours, reference = model(ids)[0].float(), theirs(ids)[0].float()
    return float((ours - reference).abs().max() / reference.std())


def transformers_model(model: Mistral, s: Setting):
    """transformers' Mistral over the very same weights, so that a GPU need hold them once."""
    from transformers import MistralConfig as TheirConfig
    from transformers import MistralForCausalLM

    c = model.config
    config = TheirConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, sliding_window=c.window,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, max_position_embeddings=32_768,
        tie_word_embeddings=c.tie_embeddings, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = MistralForCausalLM(config).to(getattr(torch, s.dtype))
    shared = {stored_name(name, "hf"): weight for name, weight in model.state_dict().items()}
    theirs.load_state_dict(shared, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(s.device)  # has no weights to load
    theirs.generation_config.eos_token_id = None  # so many tokens, whatever they are
    return theirs.eval().requires_grad_(False)


def transformers_rate(theirs, s: Setting, context: int, attention: str, static: bool = False) -> Callable[[], float]:
    """Tokens a second of ``generate``, timed from its first new token (the prefill's) on.

    ``static``: with its static cache, which it compiles by itself on a GPU; elsewhere it is asked to, without a compiler.
    """
    from transformers import CompileConfig, StoppingCriteriaList

    ids = random_ids(s, context)
    options = {"cache_implementation": "static"} if static else {}
    if static and not s.cuda:
        options["compile_config"] = CompileConfig(backend="eager", mode="default")
        options["compile_config"]._compile_all_devices = True

    def rate() -> float:
        theirs.set_attn_implementation(attention)
        begun: list[float] = []
        never = torch.zeros(1, dtype=torch.bool, device=s.device)

        def on_token(ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
            if not begun:
                wait(s.device)
                begun.append(time.perf_counter())
            return never

        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1 + s.steps, do_sample=False,
                              stopping_criteria=StoppingCriteriaList([on_token]), **options)  # fmt: skip
        wait(s.device)
        seconds = time.perf_counter() - begun[0]
        if out.shape[1] != context + 1 + s.steps:
            raise RuntimeError(f"transformers made {out.shape[1] - context} tokens of {1 + s.steps}")
        return s.steps / seconds

    return rate


class GptFast:
    """gpt-fast's model over our weights, and its decode step: from a checkout of github.com/meta-pytorch/gpt-fast."""

    def __init__(self, s: Setting, model: Mistral) -> None:
        sys.path.insert(0, str(s.gpt_fast))
        try:
            self.code = importlib.import_module("generate")
            theirs = importlib.import_module("model")
        finally:
            sys.path.remove(str(s.gpt_fast))
        self.s, c = s, model.config
        longest = max(s.few_contexts) + s.steps
        args = theirs.ModelArgs(
            block_size=longest, vocab_size=c.vocab_size, n_layer=c.n_layers, n_head=c.n_heads, dim=c.d_model,
            intermediate_size=c.d_ff, n_local_heads=c.n_kv_heads, rope_base=c.rope_theta, norm_eps=c.norm_eps,
        )  # fmt: skip
        with torch.device("meta"):
            self.model = theirs.Transformer(args).to(model.dtype)
        weights = {}
        for name, weight in model.state_dict().items():  # Mistral's names and order of rows, as gpt-fast reads them
            heads = {"q_proj.weight": c.n_heads, "k_proj.weight": c.n_kv_heads}.get(name.split("attention.")[-1])
            weights[stored_name(name, "mistral")] = halves_to_interleaved(weight, heads) if heads else weight
        self.model.load_state_dict(weights, assign=True)
        self.model.requires_grad_(False).eval()
        with torch.device(s.device):
            self.model.setup_caches(1, longest)
        step = self.code.decode_one_token
        self.step = torch.compile(step, mode="reduce-overhead", fullgraph=True) if s.cuda else step
        asked = ["git", "-C", str(s.gpt_fast), "rev-parse", "HEAD"]
        self.commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"

    def mask(self, T: int):
        longest = self.model.max_seq_length
        return self.code.create_block_mask(self.code.causal_mask, 1, 1, T, longest, device=self.s.device)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(self.mask(ids.shape[1]), ids, torch.arange(ids.shape[1], device=ids.device))

    def rate(self, context: int) -> Callable[[], float]:
        blocks = self.mask(self.model.max_seq_length)
        first = torch.zeros(1, 1, dtype=torch.int, device=self.s.device)

        @torch.inference_mode()
        def steps() -> None:
            token, position = first, torch.tensor([context], device=self.s.device)
            for _ in range(self.s.steps):
                token, _ = self.step(self.model, token, position, blocks)
                token = token.clone()  # the next replay writes over it
                position += 1

        seconds = timed(steps, self.s.device)
        return lambda: self.s.steps / seconds()
