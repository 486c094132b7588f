"""Mistral's own weights, where they are: the same text and logits as transformers, from the same folder.

``ATTNLAB_MISTRAL=path make test-long`` names a folder in Hugging Face's layout with its tokenizer. bfloat16 on the CPU, one program
after the other, so that 16 GB of memory do for 7B; some minutes. A small random checkpoint of the same layout runs the same code always.
That the tolerance is narrow enough to see a wrong setting, test_full_shape.py shows.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest
import torch
from test_full_shape import LARGEST, MEAN, difference, write_random_checkpoint

from attnlab.mistral import MistralConfig

PROMPTS = (
    "This is a test",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Il était une fois, dans une forêt lointaine, un",
)
N_NEW = 24

_OURS = """
import json, sys
import torch
import attnlab

folder, results, prompts, n_new = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
lm = attnlab.load(folder, device="cpu", dtype="bfloat16", progress=False)
ids = [lm.tokenizer.encode(prompt) for prompt in prompts]
with torch.inference_mode():
    logits = [lm.model(torch.tensor([row]))[0].float() for row in ids]
new = attnlab.generate(lm, ids[0], max_new_tokens=n_new)
text = prompts[0] + attnlab.generate(lm, prompts[0], n_new, raw=True)
torch.save({"ids": ids, "logits": logits, "new": new, "text": text}, results)
"""
# Its tokenizer makes the ids anew; its logits after every one of our tokens say how near it came to another choice.
_THEIRS = """
import json, sys
import torch
from transformers import AutoTokenizer, MistralForCausalLM

folder, results, prompts, n_new = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
ours = torch.load(results)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = MistralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
with torch.inference_mode():
    logits = [model(torch.tensor([row])).logits[0].float() for row in ours["ids"]]
    first = torch.tensor([ours["ids"][0]])
    new = model.generate(first, do_sample=False, max_new_tokens=n_new, pad_token_id=0)[0, first.shape[1]:].tolist()
    along = model(torch.tensor([ours["ids"][0] + ours["new"]])).logits[0, first.shape[1] - 1 : -1].float()
ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
text = tokenizer.decode(first[0].tolist() + new, skip_special_tokens=True)
torch.save({"ids": ids, "logits": logits, "new": new, "along": along, "text": text}, results + ".theirs")
"""


def run(script: str, folder: Path, results: Path) -> dict:
    command = [sys.executable, "-c", script, str(folder), str(results), json.dumps(PROMPTS), str(N_NEW)]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(results if script is _OURS else f"{results}.theirs")


def compare(folder: Path, results: Path) -> tuple[dict, dict]:
    """What both say, after comparing logits, ids, and the greedy continuation up to where rounding may part them."""
    assert (folder / "config.json").exists(), f"{folder}: transformers reads Hugging Face's layout, with config.json"
    ours, theirs = run(_OURS, folder, results), run(_THEIRS, folder, results)
    assert [row[1:] for row in ours["ids"]] == theirs["ids"]  # ours begins with <s>
    for mine, reference in zip(ours["logits"], theirs["logits"], strict=True):
        assert reference.isfinite().all() and reference.std() > 0.1
        largest, mean = difference(mine, reference)
        assert largest < LARGEST and mean < MEAN
    new = zip(ours["new"], theirs["new"], strict=False)  # theirs keeps the end token, ours leaves it out
    n = next((i for i, (mine, reference) in enumerate(new) if mine != reference), None)
    if n is None:
        assert ours["text"] == theirs["text"]
    else:  # its own logits hardly tell our token from its own
        along = theirs["along"][n]
        behind = along.max() - along[ours["new"][n]]
        assert behind <= LARGEST * (theirs["along"].max() - theirs["along"].min()), f"they part at token {n}"
    return ours, theirs


CONFIG = MistralConfig(
    vocab_size=32_000, d_model=64, n_layers=4, n_heads=8, n_kv_heads=2, d_ff=224, head_dim=8, window=4096, rope_theta=1e4
)  # fmt: skip


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> Path:
    """A folder like Mistral 7B v0.1's: shards with an index, config.json, tokenizer.model."""
    folder = tmp_path_factory.mktemp("weights") / "Mistral-7B-v0.1"
    folder.mkdir()
    write_random_checkpoint(CONFIG, folder, 4_000_000)
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


def test_a_random_checkpoint_of_the_same_layout_gives_transformers_logits_ids_and_text(random_weights, tmp_path):
    ours, theirs = compare(random_weights, tmp_path / "results.pt")
    assert len(ours["new"]) == len(theirs["new"]) == N_NEW
    assert len(list(random_weights.glob("model-*-of-*.safetensors"))) > 2


@pytest.mark.long
@pytest.mark.mistral_weights
def test_mistrals_own_weights_give_transformers_logits_ids_and_text(tmp_path):
    ours, _ = compare(Path(os.environ["ATTNLAB_MISTRAL"]).expanduser(), tmp_path / "results.pt")
    print(ours["text"])
    assert len(ours["text"]) > len(PROMPTS[0]) + 20  # it says something
