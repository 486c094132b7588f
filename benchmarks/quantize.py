"""What int8 and int4 weights cost in quality and bring in memory and speed, on a CPU.

    quality   the companion on the files its training held out: bits per byte, divergence from float32, how often the
              likeliest token stays the same; needs the folder of the companion's training run
    half      decoding with half a billion parameters, every form and transformers interleaved in one run
    full      the shape of Mistral 7B, each form in a process of its own: what it holds, and tokens a second
    kernels   one row times one matrix of those two shapes: weights a second, by torch's kernels and by others

The weights of the last three are random: good for memory and speed, they say nothing about text. A section is written when it is
done; one that is in the record already is skipped.

    python benchmarks/quantize.py --run FOLDER           all of them, a quarter of an hour; writes results/quantize-<machine>.json
    python benchmarks/quantize.py --sections half full kernels   need no training run
    python benchmarks/quantize.py --quick                every branch at toy size, writes nothing
"""

import argparse
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    interleave,
    machine,
    provenance,
    ratios,
    read_record,
    record_path,
    script,
    spread,
    write_record,
)
from gpu_peers import transformers_model, transformers_rate
from gpu_tools import Setting, decode_rate, full, measured_bandwidth, random_ids, random_model, speed_row, toy
from kernel_peers import kernel_rows
from torch import nn
from tqdm import tqdm

import attnlab
from attnlab import memory
from attnlab.errors import InputError
from attnlab.generate import Decoder
from attnlab.kernels import suit_processor_
from attnlab.loading import free_bytes
from attnlab.mistral import PRESETS, Mistral, MistralConfig
from attnlab.quantize import FORMS, QuantizedLinear, linear_names, quantize_

HALF = MistralConfig(
    vocab_size=32_000,
    d_model=1536,
    n_layers=13,
    n_heads=12,
    n_kv_heads=4,
    d_ff=5376,
    window=4096,
    name="half a billion",
)
TARGETS = {  # times transformers in float32, from the start of the project
    "attnlab float32": 1.0,
    "attnlab bfloat16": 1.5,
    "attnlab int8": 3.5,
    "attnlab int4": 5.0,
}
WINDOW = 256  # tokens that stand behind each other when the companion is measured
GREEDY = 48


# ---- quality ----------------------------------------------------------------------------------------------------------


def quality(files: list) -> dict:
    """Every form of the companion beside itself in float32, on the same windows of the held-out files."""
    exact = attnlab.load("companion", device="cpu", dtype="float32", progress=False)
    others = {"bfloat16": attnlab.load("companion", device="cpu", dtype="bfloat16", progress=False)}
    for form in FORMS:
        others[form] = attnlab.load("companion", device="cpu", dtype="float32", quantize=form, progress=False)
    models = {"float32": exact.model} | {name: lm.model for name, lm in others.items()}
    by_file = [measured(models, file) for file in tqdm(files, desc="held-out files", leave=False, delay=2)]
    found = {name: [sums[name] for sums in by_file] for name in models}
    n_bytes = sum(len(file.text.encode()) for file in files)
    return {
        "files": len(files),
        "bytes": n_bytes,
        "tokens": sum(len(file.ids) for file in files),
        "window": WINDOW,
        "quality": [
            {
                "weights": name,
                "computed_in": str(models[name].dtype).removeprefix("torch."),
                "bits_per_byte": sum(row["nats"] for row in rows) / math.log(2) / n_bytes,
                "divergence_nats": sum(row["divergence"] for row in rows) / sum(row["tokens"] for row in rows),
                "same_likeliest": sum(row["same"] for row in rows) / sum(row["tokens"] for row in rows),
                "same_likeliest_by_file": spread([row["same"] / row["tokens"] for row in rows]),
            }
            for name, rows in found.items()
        ],
    }


@torch.inference_mode()
def measured(models: dict[str, Mistral], file) -> dict[str, dict]:
    """By model, over a file's tokens: the sum of negative log-likelihoods, of divergences from the first model, and of tokens
    where the likeliest is the first model's.
    """
    from attnlab.training.report import windows

    sums = {name: {"tokens": 0, "nats": 0.0, "divergence": 0.0, "same": 0} for name in models}
    for inputs, targets in zip(*(part.split(8) for part in windows(file.ids, WINDOW, WINDOW)), strict=True):
        counted, exact = targets != -100, None
        for name, model in models.items():
            q = model(inputs)[counted].float().log_softmax(-1)  # (tokens, vocab)
            exact = q if exact is None else exact
            sums[name]["tokens"] += len(q)
            sums[name]["nats"] += float(F.nll_loss(q, targets[counted], reduction="sum"))
            sums[name]["divergence"] += float(F.kl_div(q, exact, reduction="sum", log_target=True))
            sums[name]["same"] += int((exact.argmax(-1) == q.argmax(-1)).sum())
    return sums


def held_out_files(run: Path) -> list:
    """The held-out files of a training run. Raises InputError for a folder without one."""
    from tokenizers import Tokenizer as BPE

    from attnlab.training.corpus import Corpus
    from attnlab.training.report import held_out

    if not (run / "corpus.json.gz").is_file():
        raise InputError(
            f"{run} holds no training run: give the folder with its corpus.json.gz, or --sections half full kernels"
        )
    return held_out(Corpus.load(run / "corpus.json.gz"), BPE.from_file(str(run / "tokenizer.json")))


def own_files(n: int) -> list:
    """The first lines of a few files of this package, for a run that only tries every branch."""
    from tokenizers import Tokenizer as BPE

    from attnlab import companion
    from attnlab.training.report import read_file

    bpe = BPE.from_file(str(companion.folder("companion") / "tokenizer.json"))
    paths = sorted(Path(attnlab.__file__).parent.glob("*.py"))[:n]
    return [read_file(path.name, path.read_text(encoding="utf-8")[:1500], bpe) for path in paths]


# ---- speed ------------------------------------------------------------------------------------------------------------


def half(s: Setting) -> dict:
    """transformers in float32 and attnlab in each form, one stretch of tokens each in turn, over the same weights."""
    read, _ = measured_bandwidth(s)
    model = random_model(s.config, s)
    theirs = transformers_model(model, s)
    settings = {"transformers float32": s, "attnlab float32": s, "attnlab bfloat16": replace(s, dtype="bfloat16")}
    settings |= {f"attnlab {form}": s for form in FORMS}
    models = {
        "attnlab float32": model,
        "attnlab bfloat16": suit_processor_(random_model(s.config, replace(s, dtype="bfloat16"))),
    }
    models |= {f"attnlab {form}": quantize_(random_model(s.config, s), form) for form in FORMS}
    rows = []
    for context in s.contexts:
        calls = {"transformers float32": transformers_rate(theirs, s, context, "sdpa")}
        calls |= {name: decode_rate(one, s, context, "eager") for name, one in models.items()}
        rates = interleave(calls, s.repetitions)
        for name, values in rates.items():
            form = name.split()[1]
            row = speed_row(settings[name], s.config, context, name, values, read, form if form in FORMS else None)
            row["times_transformers"] = ratios(values, rates["transformers float32"])
            rows.append(row)
            show(row)
    return {
        "parameters": memory.n_params(s.config),
        "bandwidth": read,
        "greedy_tokens_equal_in_float32": same_greedy(model, theirs, s),
        "rows": rows,
        "targets": targets(rows),
    }


def targets(rows: list[dict]) -> list[dict]:
    """What was to be reached at the shortest context, beside what was."""
    first = min(row["context"] for row in rows)
    got = {row["what"]: row["times_transformers"]["median"] for row in rows if row["context"] == first}
    return [
        {"what": name, "times_transformers": got[name], "target": target, "reached": got[name] >= target}
        for name, target in TARGETS.items()
    ]


@torch.inference_mode()
def same_greedy(model: Mistral, theirs, s: Setting) -> str:
    """How many of the likeliest tokens after a prompt are the same, before the first that isn't."""
    ids = random_ids(s, s.contexts[0])
    decoder, ours = Decoder(model, ids.shape[1] + GREEDY), []
    token = decoder.prefill(ids).argmax(-1)
    for _ in range(GREEDY):
        ours.append(int(token))
        token = decoder.step(token).argmax(-1)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY, do_sample=False)
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, out[0, ids.shape[1] :].tolist(), strict=True))
    )
    return f"{same} of {GREEDY}"


def full_shape(s: Setting) -> dict:
    """Each form alone in a process, which is all that fits; bytes a second are measured in each, before and after."""
    rows, left_out = [], []
    for form in ("bfloat16", *FORMS):
        need = memory.weight_bytes(s.config, "bfloat16", form if form in FORMS else None) * 1.1
        if need > free_bytes("cpu"):
            left_out.append({"what": form, "why": f"{memory.human_bytes(free_bytes('cpu'))} are free"})
            print(f"  left out: {form}, no room")
            continue
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            rows += alone.submit(alone_at_full_shape, s, form, torch.get_num_threads()).result()
        for row in rows[-len(s.contexts) :]:
            show(row)
    base = {row["context"]: row for row in rows if row["what"] == "bfloat16"}
    for row in rows:
        if row["context"] in base:
            slower = base[row["context"]]["tokens_per_second"]["median"]
            row["times_bfloat16"] = row["tokens_per_second"]["median"] / slower
    return {"parameters": memory.n_params(s.config), "rows": rows} | ({"left_out": left_out} if left_out else {})


def alone_at_full_shape(s: Setting, form: str, threads: int) -> list[dict]:
    """Runs in a process of its own: makes the model, holds it, decodes."""
    torch.set_num_threads(threads)
    quantize = form if form in FORMS else None
    before, (read, _) = resident("VmRSS"), measured_bandwidth(s)
    model = made_in_place(s, quantize)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    taken = {"resident": resident("VmRSS") - before, "peak_while_made": resident("VmHWM") - before}
    rows = []
    for context in s.contexts:
        rate = decode_rate(model, s, context, "eager")
        rates = [rate() for _ in range(s.repetitions + 1)][1:]
        row = speed_row(s, s.config, context, form, rates, read, quantize)
        rows.append(
            row
            | {"weight_bytes": held, "bytes_of_process": taken, "read_bytes_per_second": read["read_bytes_per_second"]}
        )
    again, _ = measured_bandwidth(s)
    return [row | {"read_bytes_per_second_after": again["read_bytes_per_second"]} for row in rows]


def kernels(s: Setting, configs: list[MistralConfig], **options: int) -> dict:
    """Every kernel on a matrix of each shape."""
    read, _ = measured_bandwidth(s)
    rows, left_out = [], []
    for config in configs:
        some, left_out = kernel_rows(config, s.repetitions, **options)
        for row in some:
            print(
                f"  {row['what']:<17}{row['rows']:>7,} × {row['columns']:<6,}"
                f"{row['weights_per_second']['median'] / 1e9:6.1f} G weights/s",
                flush=True,
            )
        rows += [{"shape": config.name, **row} for row in some]
    return {"bandwidth": read, "rows": rows} | ({"left_out": left_out} if left_out else {})


def made_in_place(s: Setting, quantize: str | None) -> Mistral:
    """A random model, each matrix made and put into its form before the next: it never exists in 16 bits as a whole."""
    if quantize is None:
        return suit_processor_(random_model(s.config, s))
    with torch.device("meta"):
        model = Mistral(s.config).to(getattr(torch, s.dtype))
    linears, generator = set(linear_names(model, quantize)), torch.Generator().manual_seed(0)
    for name, empty in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight = torch.empty(empty.shape, dtype=empty.dtype)
        weight = weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0.0, 0.02, generator=generator)
        if owner in linears:
            model.set_submodule(owner, QuantizedLinear(weight, quantize))
        else:
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight))
    return model.requires_grad_(False).eval()


def resident(what: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM the most so far. 0 where the system doesn't say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), 0)


def show(row: dict) -> None:
    beside = row.get("times_transformers")
    held = row.get("bytes_of_process")
    print(
        f"  {row['what']:<21}{row['context']:>6,} tokens  {row['tokens_per_second']['median']:>8,.2f} tokens/s  "
        f"{row['fraction_of_bandwidth']:.0%} of the bandwidth"
        + (f"  {beside['median']:.2f}× transformers" if beside else "")
        + (f"  {memory.human_bytes(held['resident'])} resident" if held else ""),
        flush=True,
    )


def show_quality(result: dict) -> None:
    for row in result["quality"]:
        print(
            f"  {row['weights']:<9} {row['bits_per_byte']:.4f} bits per byte, {row['divergence_nats']:.5f} nats from float32, "
            f"the same likeliest token in {row['same_likeliest']:.2%}"
        )


# ---- the record -------------------------------------------------------------------------------------------------------


def sections(quick: bool, run: Path | None, repetitions: int) -> dict[str, Callable[[], dict]]:
    if quick:
        s = replace(toy(), config=toy().config.replace(d_model=64, window=None), contexts=(5,))
        return {
            "quality": lambda: quality(own_files(2)),
            "half": lambda: half(s),
            "full": lambda: full_shape(replace(s, dtype="bfloat16", limit=None)),
            "kernels": lambda: kernels(s, [s.config], nbytes=100_000),
        }
    s = replace(full("cpu"), contexts=(128, 2048), steps=16, bandwidth_bytes=1_000_000_000, repetitions=repetitions)
    return {
        "quality": lambda: quality(held_out_files(run)),
        "half": lambda: half(replace(s, config=HALF, dtype="float32")),
        "full": lambda: full_shape(replace(s, config=PRESETS["mistral-7b-v0.1"], contexts=(128,), steps=8)),
        "kernels": lambda: kernels(s, [HALF, PRESETS["mistral-7b-v0.1"]]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("quality", "half", "full", "kernels")
    parser.add_argument("--sections", nargs="+", choices=names, default=list(names), help="which (all)")
    parser.add_argument("--run", type=Path, help="the folder of the companion's training run, for its held-out files")
    parser.add_argument("--quick", action="store_true", help="toy sizes, no record")
    parser.add_argument("--redo", action="store_true", help="measure sections again that are in the record")
    parser.add_argument("--repetitions", type=int, default=5, help="how many (5)")
    parser.add_argument("--threads", type=int, help="how many (as torch chooses)")
    parser.add_argument("--overwrite", action="store_true", help="replace a record even of another machine")
    parser.add_argument("--commit", help="the tree's commit, where git can't tell")
    args = parser.parse_args()
    if args.repetitions < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--repetitions and --threads are 1 or more")
    if "quality" in args.sections and args.run is None and not args.quick:
        parser.error(
            "quality needs --run, the folder of the companion's training run; or choose --sections half full kernels"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    todo = sections(args.quick, args.run, args.repetitions)
    described = machine()
    path = record_path("quantize", described)
    record = {} if args.quick else read_record(path, described, args.overwrite) or {}
    record = {"script": "quantize", "machine": described, "sections": {}} | record
    for name in args.sections:
        if name in record["sections"] and not args.redo:
            print(f"{name}: in the record already (--redo measures it again)", flush=True)
            continue
        print(name, flush=True)
        result = todo[name]()
        if name == "quality":
            show_quality(result)
        for row in result.get("targets", []):
            print(f"  {row['what']}: {row['times_transformers']:.2f}× where {row['target']}× was to be reached")
        if not args.quick:
            record["sections"][name] = {**provenance(args.commit), "threads": torch.get_num_threads(), **result}
            write_record(path, record, args.overwrite)
    print("toy sizes: the times mean nothing, and nothing was recorded" if args.quick else f"record: {path.name}")
    return 0


if __name__ == "__main__":
    script(main)
