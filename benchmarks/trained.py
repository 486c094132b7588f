"""What ``gpu.py --model FOLDER`` records of trained weights: text, maps and speed, for whoever has Mistral's.

A greedy continuation of a fixed prompt, which anybody with the same weights can compare; the attention maps of fixed texts
as 8-bit records; and decoding speed beside this machine's bandwidth. Written as results/trained-<model>-<machine>.json and,
for each text, results/trained-<model>-<machine>-maps-<n>.npz, which ``attnlab.AttentionRecord.load`` reads.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import RESULTS, machine, provenance, read_record, record_path, write_record
from gpu_tools import Gathered, decode_rate, full, measured_bandwidth, speed_row

import attnlab
from attnlab import memory

PROMPT = "This is a test"
NEW_TOKENS = 64
TEXTS = (
    "This is a test",
    "The cup fell off the shelf because it was too close to the edge.",
    "red green blue yellow red green blue yellow red green",
    "def area(width, height):\n    return width * height\n",
)


def record(args: argparse.Namespace) -> int:
    lm = attnlab.load(args.model, device=args.device)
    device = str(lm.model.device)
    described = machine(device)
    path = record_path(f"trained-{lm.name}", described, args.out or RESULTS)
    read_record(path, described, args.overwrite)  # refuse to replace another machine's before the work, not after
    content = {
        "script": "gpu.py --model",
        "machine": described,
        **provenance(args.commit),
        "model": {
            "name": lm.name,
            "dtype": dtype_name(lm),
            "parameters": memory.n_params(lm.config),
            "n_layers": lm.config.n_layers,
            "n_heads": lm.config.n_heads,
            "n_kv_heads": lm.config.n_kv_heads,
            "window": lm.config.window,
        },
        "continuation": continuation(lm),
        "maps": maps(lm, path),
        **speed(lm, device),
    }
    write_record(path, content, args.overwrite)
    print(f"record: {path.name}")
    return 0


def dtype_name(lm: attnlab.LanguageModel) -> str:
    return str(lm.model.dtype).removeprefix("torch.")


def continuation(lm: attnlab.LanguageModel) -> dict:
    """Greedy, from the text as it stands: no template, also for an instruct model."""
    prompt = lm.tokenizer.encode(PROMPT)
    ids = attnlab.generate(lm, prompt, max_new_tokens=NEW_TOKENS)
    text = lm.tokenizer.decode(prompt + ids)
    print(f"{text!r}")
    return {"prompt": PROMPT, "prompt_ids": prompt, "ids": ids, "text": text}


def maps(lm: attnlab.LanguageModel, path: Path) -> list[dict]:
    """One file a text beside the record, and what is in it."""
    rows = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(TEXTS, start=1):
        file = path.with_name(f"{path.stem}-maps-{i}.npz")
        taken = attnlab.record_attention(lm, text)
        taken.save(file, bits=8)
        rows.append({"text": text, "tokens": len(taken.key_tokens), "file": file.name, "bytes": file.stat().st_size})
        print(f"  maps of {rows[-1]['tokens']} tokens, {memory.human_bytes(rows[-1]['bytes'])}: {text!r}")
    return rows


def speed(lm: attnlab.LanguageModel, device: str) -> dict:
    """Tokens a second after a short and a longer context, whose keys and values are random here too."""
    s = replace(full(device), config=lm.config, dtype=dtype_name(lm), contexts=(128, 2048), repetitions=3)
    if not s.cuda:
        s = replace(s, steps=16, bandwidth_bytes=500_000_000)
    got = Gathered()
    read, _ = measured_bandwidth(s)
    for context in s.contexts:
        entrants = {mode: partial(decode_rate, lm.model, s, context, mode) for mode in s.modes}
        for name, values in got.race(s, f"{context:,} tokens", entrants).items():
            got.rows.append(speed_row(s, lm.config, context, name, values, read))
            print(f"  {name}, {context:,} tokens: {got.rows[-1]['tokens_per_second']['median']:.1f} tokens/s")
    return {"bandwidth": read, "speed": got.rows} | ({"left_out": got.left_out} if got.left_out else {})
