"""The command line: ``attnlab doctor``, ``attnlab generate``, ``attnlab explore``, ``attnlab memory``,
``attnlab choose``, ``attnlab convert``, ``attnlab serve``.

What a command prints goes to stdout; progress, notes and errors go to stderr. Exit codes: 0 done, 1 failed, 2 wrong input,
130 interrupted. Heavy imports wait until a command needs them, so that ``--help`` is quick.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from attnlab.errors import AttnlabError, ConfigError, InputError, ShapeError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ESSENTIAL = ("torch", "numpy", "einops", "jaxtyping", "safetensors", "tokenizers")
FOR = {  # what is missing without it
    "mistral-common": "the tokenizers of Mistral's own models",
    "transformers": "recording attention of other models, comparing with the reference",
    "huggingface_hub": "downloading models by name",
    "matplotlib": "figures",
    "seaborn": "heat maps",
    "ipywidgets": "knobs in notebooks",
    "anywidget": "explorers",
    "fastapi": "attnlab serve",
    "uvicorn": "attnlab serve",
}


def main(args: list[str] | None = None) -> None:
    """What the ``attnlab`` command runs: ends the process with its exit code."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run a command; its exit code. Errors that attnlab raises on purpose, and wrong usage, are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        code = app(args, prog_name="attnlab", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except AttnlabError as error:
        _say(f"attnlab: {error}")
        return 2 if isinstance(error, InputError | ConfigError | ShapeError) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader has gone, as `| head` does when it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor let the last flush complain
        return 1
    except OSError as error:
        _say(f"attnlab: {error}")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own, and typer's copy of them, for wrong usage
            raise
        asked = getattr(getattr(error, "ctx", None), "command_path", "attnlab")
        _say(f"attnlab: {error.format_message().rstrip('.')}; try {asked} --help")
        return error.exit_code


def _say(line: str) -> None:
    """One line on stderr."""
    print(" ".join(line.split()), file=sys.stderr)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"attnlab {version('attnlab')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def attnlab(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Attention, from the dot product to Mistral 7B: run a model, count its memory, see what this machine can do.

    \b
    Start with
      attnlab doctor                       is everything here?
      attnlab generate "def"               the model that ships with attnlab writes Python
      attnlab explore "def f(x):" --out maps.html    every head's attention, in one page
      attnlab memory mistral-7b-v0.1 llama-2-7b --context 32768 --batch 8
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


ModelName = Annotated[
    str,
    typer.Option(
        help='"companion", one of its siblings ("multi-head", "grouped-query", "multi-query"), a folder, or a hub id.'
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best one here if not given.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; what suits the device if not given.")]
Quantize = Annotated[
    str | None, typer.Option(help="int8 or int4: store linear weights in a half or a third of 16 bits' memory.")
]
QuantizeCache = Annotated[str | None, typer.Option(help="int8: keep keys and values in 8 bits.")]


@app.command(short_help="Go on from a prompt.")
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; - or nothing reads stdin.")] = None,
    model: ModelName = "companion",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not wrap the prompt in an instruct model's template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
) -> None:
    """Go on from a prompt, streaming the text as it comes.

    \b
    Examples
      attnlab generate "def"
      attnlab generate "class Stack:" --max-new-tokens 200 --temperature 0.7 --seed 1
      attnlab generate "Why is the sky blue?" --model mistralai/Mistral-7B-Instruct-v0.3
      attnlab generate "Hello" --model mistralai/Mistral-7B-v0.3 --quantize int4
      cat start.py | attnlab generate -

    A prompt should not end with a space: to the model a space belongs to the word that follows, so after "def " it has
    nothing likely left to say, and after "def" it has.
    """
    text = _read_text(prompt, 'no prompt came: attnlab generate "def", or pipe one in')
    import attnlab

    lm = attnlab.load(model, device=device, dtype=dtype, quantize=quantize)
    chat = lm.tokenizer.is_instruct and not raw
    if text != text.rstrip(" ") and not chat:
        _say('note: the prompt ends with a space, after which models continue badly; "def" works better than "def "')
    pieces = attnlab.stream(lm, text, max_new_tokens, temperature, top_p, seed, raw, quantize_cache=quantize_cache)
    last = ""
    with _waiting("reading the prompt"):
        first = next(pieces, "")
    if sys.stdout.isatty() and not chat:
        typer.secho(text, dim=True, nl=False)  # so that it reads as one text; a pipe gets only what is new
    for piece in itertools.chain([first], pieces):
        print(piece, end="", flush=True)
        last = piece or last
    if not last.endswith("\n"):
        print()


def _read_text(given: str | None, none_came: str) -> str:
    """The argument, or stdin without the line end that echo and editors put there."""
    if given is None and sys.stdin.isatty():
        raise InputError(none_came)
    if given not in (None, "-"):
        return given
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from error
    return text.replace("\r\n", "\n").removesuffix("\n")


@app.command(short_help="Look at every head's attention over a text.")
def explore(
    text: Annotated[str | None, typer.Argument(help="Text to look at; - or nothing reads stdin.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write: one file that needs nothing else.")] = Path("maps.html"),
    model: ModelName = "companion",
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Run a model once over a text and write all its attention maps into one page, which any browser opens offline.

    \b
    Examples
      attnlab explore "def add(a, b):" --out maps.html
      attnlab explore "The cat sat on the mat" --model mistralai/Mistral-7B-v0.1 --out cat.html
      attnlab explore --out maps.html < some.py

    The text is taken as it stands: no chat template.
    """
    text = _read_text(text, 'no text came: attnlab explore "def add(a, b):", or pipe one in')
    if not text:
        raise InputError("the text is empty: attnlab explore needs at least one token to look at")
    out = out.expanduser()
    if out.is_dir() or not out.parent.is_dir():  # said before the model runs, not after
        raise InputError(f"cannot write a page to {out}: give a file in a folder that exists")
    import attnlab
    from attnlab.explorer.attention import AttentionExplorer, check_size

    lm = attnlab.load(model, device=device, dtype=dtype, quantize=quantize)
    L, H, T = lm.config.n_layers, lm.config.n_heads, len(lm.tokenizer.encode(text))
    check_size(L, H, T, T, causal=True)  # nor this
    _say(f"{lm.config.name}: {T} tokens, {L} layers × {H} heads")
    with _waiting("recording"):
        record = attnlab.record_attention(lm, text)
    with _waiting("writing the page"):
        AttentionExplorer(record).save_html(out, title=f"Attention of {record.model_name}")
    print(f"{out} ({attnlab.memory.human_bytes(out.stat().st_size)})")


@app.command(short_help="What models take, side by side.")
def memory(
    names: Annotated[
        list[str], typer.Argument(help='Models by name, "companion" or a sibling, or checkpoint folders.')
    ],
    context: Annotated[int, typer.Option(help="Tokens behind each row of the batch.")] = 4096,
    batch: Annotated[int, typer.Option(help="Rows decoded together.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
    device_gb: Annotated[
        float | None, typer.Option(help="Memory of a device in GB (10^9 bytes): what fits on it?")
    ] = None,
) -> None:
    """What models take: weights, cache a token, cache as a whole, bytes read a step. Side by side, exact, nothing loaded.

    \b
    Examples
      attnlab memory mistral-7b-v0.1 llama-2-7b --context 32768 --batch 8
      attnlab memory mistral-7b-v0.3 --context 8192 --device-gb 24
      attnlab memory mistral-7b-v0.3 --context 32768 --device-gb 16 --quantize int4 --quantize-cache int8
      attnlab memory path/to/checkpoint
    """
    from attnlab import memory as accounts

    models = [_model_shape(name) for name in names]
    stored = {"dtype": dtype, "quantize": quantize, "quantize_cache": quantize_cache}
    rows = accounts.compare(models, context, batch, **stored)
    size = accounts.human_bytes

    lines = {
        "attention": [row["kind"] for row in rows],
        "  heads / K/V heads": [f"{row['n_heads']} / {row['n_kv_heads']}" for row in rows],
        "window": [_windows(row["windows"]) for row in rows],
        "weights": [size(row["weight_bytes"]) for row in rows],
        "cache, a token": [size(row["kv_bytes_per_token"]) for row in rows],
        "  of multi-head's": [f"1/{row['vs_multi_head']:.3g}" if row["vs_multi_head"] != 1 else "all" for row in rows],
        f"cache, {batch} × {context:,}": [size(row["cache_bytes"]) for row in rows],
        "read a step": [size(row["bytes_per_step"]) for row in rows],
    }
    if device_gb is not None:
        most, answers = [], []
        for model in models:
            most.append(f"{accounts.largest_batch(model, device_gb * 1e9, context, **stored):,}")
            answers.append("yes" if accounts.fits(model, device_gb * 1e9, context, batch, **stored) else "no")
        lines[f"fits {device_gb:g} GB"] = answers
        lines["  largest batch"] = most
    _table(accounts.setting_in_words(context, batch, **stored), [row["model"] for row in rows], lines)
    for row in rows:
        if row["beyond_max_context"]:
            print(f"{row['model']} was made for fewer than {context:,} tokens: arithmetic only")


@app.command(short_help="How many K/V heads for this model, card and batch?")
def choose(
    name: Annotated[str, typer.Argument(help='A model by name, "companion" or a sibling, or a checkpoint folder.')],
    card: Annotated[str, typer.Option(help='A card by the first words of its name: "h100", "rtx 4090".')],
    context: Annotated[int, typer.Option(help="Tokens behind each row of the batch.")] = 4096,
    batch: Annotated[int, typer.Option(help="Rows decoded together.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quantize: Quantize = None,
    at_least: Annotated[float, typer.Option(help="Of the fastest style's speed, the share to keep.")] = 0.5,
) -> None:
    """Multi-head, grouped-query or multi-query: the most K/V heads that fit and keep a share of the fastest style's speed.

    \b
    Examples
      attnlab choose mistral-7b-v0.2 --card a100 --context 4096 --batch 16
      attnlab choose llama-2-7b --card "rtx 4090" --batch 4 --quantize int4

    Speeds are ceilings: the card's bandwidth over the bytes that a step reads. Of quality the arithmetic knows nothing.
    """
    from attnlab import memory as accounts

    print(accounts.choose(_model_shape(name), card, context, batch, dtype, quantize, at_least=at_least))


def _model_shape(name: str):
    """A preset's name, or the config of a folder."""
    from attnlab import companion
    from attnlab import memory as accounts
    from attnlab.checkpoint import read_config

    if name.lower() in accounts.SHAPES:
        return name
    shipped = companion.folder(name)
    folder = shipped or Path(name).expanduser()
    if folder.is_dir():
        return read_config(folder).replace(name=name if shipped else folder.resolve().name)
    return accounts.as_shape(name)  # which knows near names


def _windows(windows: tuple[int | None, ...]) -> str:
    kinds = set(windows)
    if kinds == {None}:
        return "none"
    if len(kinds) == 1:
        return f"{windows[0]:,}"
    limited = [window for window in windows if window is not None]
    return f"{', '.join(f'{window:,}' for window in sorted(set(limited)))} in {len(limited)} of {len(windows)}"


def _table(title: str, columns: list[str], lines: dict[str, list[str]]) -> None:
    """Side by side in a terminal; in a pipe as wide as it must be, so that nothing is cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for name, cells in lines.items():
        table.add_row(name, *cells)
    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(title, style="italic", highlight=False)  # not the table's title, which is no wider than the table
    console.print(table)


@app.command(short_help="Give a model fewer K/V heads.")
def convert(
    name: Annotated[str, typer.Argument(help='"multi-head" or another model of attnlab, a folder, or a hub id.')],
    out: Annotated[Path, typer.Option(help="The folder to write, which must not exist yet.")],
    n_kv_heads: Annotated[int, typer.Option(help="How many key/value heads it shall have.")],
    pooling: Annotated[str, typer.Option(help="mean, first or random: how a group's heads become one.")] = "mean",
    align: Annotated[bool, typer.Option("--align", help="Turn the heads towards each other before.")] = False,
    seed: Annotated[int, typer.Option(help="For random pooling.")] = 0,
) -> None:
    """Pool the key/value heads of a model into fewer, and write it as a folder that attnlab and transformers load.

    \b
    Examples
      attnlab convert multi-head --n-kv-heads 2 --out grouped
      attnlab convert multi-head --n-kv-heads 1 --align --out one-head

    The model runs at once and predicts worse; training it on for a while brings most of it back (chapter 7).
    """
    from attnlab import memory as accounts
    from attnlab.convert import convert_folder

    model = convert_folder(name, out, n_kv_heads, pooling, seed, align)
    size = accounts.human_bytes(accounts.kv_bytes_per_token(model.config, model.dtype))
    print(f"{out}: {model.config.n_heads} query heads on {n_kv_heads} K/V heads, {size} of cache a token")


@app.command(short_help="Serve a model over HTTP.")
def serve(
    model: ModelName = "companion",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Where to listen. Anything but this machine itself needs a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="ATTNLAB_TOKEN", help="What callers must send as Authorization: Bearer ...")
    ] = None,
    rows: Annotated[
        int, typer.Option(help="Conversations at once; the memory of their cache is taken at the start.")
    ] = 16,
    max_len: Annotated[int, typer.Option(help="Tokens of one conversation, prompt and answer.")] = 2048,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
) -> None:
    """Serve a model with the API of the announcement (Workers AI), and OpenAI's form of it.

    \b
    Examples
      attnlab serve --model companion --port 8000
      attnlab serve --model mistralai/Mistral-7B-Instruct-v0.3 --quantize int4
      curl http://127.0.0.1:8000/client/v4/accounts/me/ai/run/companion -d '{"prompt": "def add(a, b):", "stream": true}'

    Ctrl-C, or SIGTERM, lets answers under way finish (up to 30 seconds) and ends it. Nothing of what is asked is logged.
    """
    import attnlab
    from attnlab.serve import Server

    lm = attnlab.load(model, device=device, dtype=dtype, quantize=quantize)
    server = Server(lm, host, port, token, rows=rows, max_len=max_len, quantize_cache=quantize_cache)
    print(f"serving {lm!r} at {server.url}", flush=True)
    server.run()


@app.command(short_help="Check this machine.")
def doctor(
    room: Annotated[
        bool,
        typer.Option("--room", help="One line to read out before a workshop: ready, or what is wrong and what to do."),
    ] = False,
) -> None:
    """Check this machine: versions, processor, memory, GPU, the model that ships, and which models would fit.

    Ends with 0 if everything essential works, with 1 if not, saying what to do. With --room it also starts a notebook kernel,
    takes under 20 seconds and prints a single line.
    """
    if room:
        from attnlab import _room

        with _waiting("checking this machine"):
            ready, line = _room.check()
        print(line)
        if not ready:
            raise typer.Exit(1)
        return
    to_do: list[str] = []
    for heading, check in (
        ("software", _software),
        ("machine", _machine),
        ("companion", _companion),
        ("what fits", _fit),
    ):
        print(heading)
        for what, finding in check(to_do):
            print(f"  {what:<17} {finding}", flush=True)
    if to_do:
        print("to do")
        for line in to_do:
            print(f"  {line}")
        raise typer.Exit(1)
    print("Everything essential works.")


def _software(to_do: list[str]):
    import platform
    from importlib.metadata import PackageNotFoundError, version

    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in ("attnlab", *ESSENTIAL, *FOR):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            if package in FOR:
                yield package, f"not here: no {FOR[package]}. pip install {package}"
            else:
                yield package, "not here"
                to_do.append(f"pip install {package}")


def _machine(to_do: list[str]):
    import torch

    from attnlab.loading import free_bytes
    from attnlab.measure import processor_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield (
        "processor",
        f"{processor_name()}; {cores} of {os.cpu_count()} cores for us, torch uses {torch.get_num_threads()}",
    )
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield "memory", f"{total / 1e9:.1f} GB, {free_bytes('cpu') / 1e9:.1f} GB free"
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        free = free_bytes(f"cuda:{i}")
        with torch.cuda.device(i):
            computes = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = "computes in bfloat16" if computes else "no bfloat16: use float16"
        yield f"GPU cuda:{i}", f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, {free / 1e9:.1f} GB free, {bf16}"
    if torch.backends.mps.is_available():
        yield "GPU mps", "Apple's, shares the memory above"
    elif not torch.cuda.is_available():
        built = "torch sees none" if torch.version.cuda else "this torch was built without CUDA"
        yield "GPU", f"none ({built}): everything in the book runs on the CPU, Mistral 7B slowly"


def _companion(to_do: list[str]):
    import attnlab

    try:
        with _waiting("loading the companion"):
            lm = attnlab.load("companion", progress=False)
            text = attnlab.generate(lm, "def", max_new_tokens=8)
    except AttnlabError as error:
        yield "fails", " ".join(str(error).split())
        to_do.append("install attnlab again: pip install --force-reinstall --no-deps attnlab")
        return
    yield "loads", repr(lm)
    yield "generates", repr("def" + text)


def _fit(to_do: list[str]):
    import torch

    from attnlab import memory as accounts
    from attnlab.loading import free_bytes

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    free = free_bytes(device)
    forms = [("float32", None, "float32"), ("bfloat16", None, "bfloat16, float16")]
    forms += [("bfloat16", form, f"bfloat16 with {form} weights") for form in accounts.QUANTIZED]
    for dtype, quantize, called in forms:
        fit = accounts.fits("mistral-7b-v0.1", free, context=4096, dtype=dtype, quantize=quantize)
        answer = "fits" if fit else "does not fit"
        sums = f"{accounts.human_bytes(fit.total)} of {accounts.human_bytes(free)} free"
        yield "Mistral 7B", f"{answer} on {device} in {called} with 4,096 tokens: {sums}"


def _waiting(what: str):
    """A line that moves while nothing else does, in a terminal only."""
    from rich.console import Console

    return Console(stderr=True).status(f"{what} …")
