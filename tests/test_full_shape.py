"""The full 7.24 B shape on a machine of this class: written in shards, loaded, compared with transformers on the same files.

One model is in memory at a time, each in a process of its own. The large one takes 14.5 GB of disk (in pytest's temporary
folder; ``--basetemp`` moves it), 16 GB of memory and some minutes, so it is marked ``long``; the small ones run the same code.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from attnlab.mistral import MistralConfig

SMALL = MistralConfig(
    vocab_size=1000, d_model=128, n_layers=4, n_heads=8, n_kv_heads=2, d_ff=448, head_dim=16, window=8, rope_theta=1e4
)  # fmt: skip
FULL = MistralConfig.preset("mistral-7b-v0.1")
CONFIGS = [
    pytest.param(SMALL, 500_000, id="small"),
    pytest.param(FULL, 1_000_000_000, id="7.24 B", marks=pytest.mark.long),
]
N_PREFILL, N_DECODE = 16, 4


def tensors_of(config: MistralConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Hugging Face checkpoint, written out here so that no code of ours decides them."""
    d, kv = config.d_model, config.n_kv_heads * config.head_dim
    q = config.n_heads * config.head_dim
    tensors = [("model.embed_tokens.weight", (config.vocab_size, d))]
    for layer in range(config.n_layers):
        tensors += [
            (f"model.layers.{layer}.{name}.weight", shape)
            for name, shape in (
                ("input_layernorm", (d,)),
                ("self_attn.q_proj", (q, d)),
                ("self_attn.k_proj", (kv, d)),
                ("self_attn.v_proj", (kv, d)),
                ("self_attn.o_proj", (d, q)),
                ("post_attention_layernorm", (d,)),
                ("mlp.gate_proj", (config.d_ff, d)),
                ("mlp.up_proj", (config.d_ff, d)),
                ("mlp.down_proj", (d, config.d_ff)),
            )
        ]
    return [*tensors, ("model.norm.weight", (d,)), ("lm_head.weight", (config.vocab_size, d))]


def write_random_checkpoint(config: MistralConfig, folder: Path, shard_bytes: int) -> int:
    """bfloat16 shards and index, one shard in memory at a time. Returns the bytes of all tensors.

    Random numbers are dear by the billion: each tensor is cut from one pool of them, from where the last one ended. The pool's
    length is odd, so that rows do not come round again in step.
    """
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**24 + 1, generator=generator).bfloat16()
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = start = 0
    for name, shape in tensors_of(config):
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size, total = size + nbytes, total + nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file, tensors = f"model-{i:05d}-of-{len(shards):05d}.safetensors", {}
        for name, shape in shard:
            weight_map[name] = file
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            n = torch.Size(shape).numel()
            turned = pool.roll(-start)
            tensors[name] = turned.repeat(-(-n // len(pool)))[:n].view(shape) * (1.2 / shape[1] ** 0.5)
            start = (start + n) % len(pool)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": config.d_model, "intermediate_size": config.d_ff, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "sliding_window": config.window,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": config.vocab_size,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stored))
    return total


# Both leave {ids, logits (20, vocab) float32, memory} in the file argv[2]. Ours chooses the decoded tokens, greedily, and
# transformers is given them. VmHWM is the peak of the resident set, mapped file pages included (macOS: ru_maxrss).
_PEAK = """
import json, resource, sys
from pathlib import Path
import torch

def peak():
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder, results, n_prefill, n_decode = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
"""
_OURS = (
    _PEAK
    + """
from attnlab.checkpoint import load_model
before = peak()
model = load_model(folder, progress=False)
loading = peak() - before
assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
ids = torch.randint(0, vocab_size, (1, n_prefill), generator=torch.Generator().manual_seed(1))
cache = model.new_cache(1, n_prefill + n_decode)
with torch.inference_mode():
    logits = [model(ids, cache=cache)[0]]
    for _ in range(n_decode):
        token = logits[-1][-1:].argmax(-1)[None]
        ids = torch.cat((ids, token), dim=1)
        logits.append(model(token, cache=cache)[0])
torch.save({"ids": ids, "logits": torch.cat(logits).float(), "loading": loading, "peak": peak() - before}, results)
"""
)
_THEIRS = (
    _PEAK
    + """
from transformers import MistralForCausalLM
ids = torch.load(results, weights_only=True)["ids"]
model = MistralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
with torch.inference_mode():
    out = model(ids[:, :n_prefill], use_cache=True)
    logits = [out.logits[0]]
    for t in range(n_prefill, n_prefill + n_decode):
        out = model(ids[:, t : t + 1], cache=out.cache, use_cache=True)
        logits.append(out.logits[0])
torch.save({"logits": torch.cat(logits).float()}, results + ".theirs")
"""
)


def run(script: str, folder: Path, results: Path) -> None:
    command = [sys.executable, "-c", script, str(folder), str(results), str(N_PREFILL), str(N_DECODE)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Largest and mean difference of two logits, in parts of their spread (largest minus smallest, over all positions)."""
    spread = theirs.max() - theirs.min()
    return ((ours - theirs).abs().max() / spread).item(), ((ours - theirs).abs().mean() / spread).item()


# bfloat16 keeps 8 bits, so each of some 7 matrices a layer rounds by up to 1/256, and errors add up like a random walk. In 32
# layers of width 256 they came to 0.016 and 0.0023 of the spread; a wrong theta (below) is more than ten times that.
LARGEST, MEAN = 0.04, 0.006


@pytest.mark.parametrize(("config", "shard_bytes"), CONFIGS)
def test_a_sharded_checkpoint_gives_transformers_logits_within_memory(tmp_path, config, shard_bytes):
    folder, results = tmp_path / "model", tmp_path / "results.pt"
    folder.mkdir()
    try:
        weights = write_random_checkpoint(config, folder, shard_bytes)
        assert len(list(folder.glob("*.safetensors"))) > 2
        run(_OURS, folder, results)
        run(_THEIRS, folder, results)
    finally:
        shutil.rmtree(folder)
    ours = torch.load(results, weights_only=True)
    theirs = torch.load(f"{results}.theirs", weights_only=True)["logits"]
    allowed = max(500e6, 0.1 * weights)
    assert ours["loading"] < weights + allowed
    assert ours["peak"] < weights + allowed  # prefill and decode included

    assert ours["logits"].shape == theirs.shape == (N_PREFILL + N_DECODE, config.vocab_size)
    assert theirs.isfinite().all() and theirs.std() > 0.1
    largest, mean = difference(ours["logits"], theirs)
    assert largest < LARGEST and mean < MEAN
    chosen = ours["ids"][0, N_PREFILL:]
    at = torch.arange(N_PREFILL - 1, N_PREFILL + N_DECODE - 1)  # the positions whose logits chose them
    behind = theirs[at].max(-1).values - theirs[at, chosen]  # 0 where transformers would have taken the same token
    assert (behind <= LARGEST * (theirs.max() - theirs.min())).all()
    same_best = ours["logits"].argmax(-1) == theirs.argmax(-1)
    assert same_best.float().mean() >= 0.8


def test_the_tolerance_is_narrow_enough_to_see_a_wrong_theta(tmp_path):
    """A slower rotation is the smallest mistake there is to make with these files; it must not pass for rounding."""
    folder, results = tmp_path / "model", tmp_path / "results.pt"
    folder.mkdir()
    write_random_checkpoint(SMALL, folder, 500_000)
    run(_OURS, folder, results)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    run(_THEIRS, folder, results)
    ours = torch.load(results, weights_only=True)["logits"]
    theirs = torch.load(f"{results}.theirs", weights_only=True)["logits"]
    largest, mean = difference(ours, theirs)
    assert largest > LARGEST and mean > MEAN
