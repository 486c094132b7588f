"""Tensor parallelism: one model over several processes, each with some of the heads and a part of every matrix.

A *rank* is one of these processes, on a GPU of its own where there are GPUs. A matrix is cut in one of two ways (Shoeybi et al.
2019, arXiv 1909.08053, section 3), both torch's own:

- by **columns**, so that a rank computes some of the outputs: queries, keys and values (whole heads), the gate and up matrices;
- by **rows**, so that a rank takes in some of the inputs and has a partial sum of every output: the output and down matrices.

Columns first, then rows: what a rank computes of the first is what it needs for the second, and nothing is sent in between.
An *all-reduce* then adds the partial sums, so that each rank goes on with the same residual stream: two for every block. The
embedding is cut by vocabulary (a rank adds zeros for tokens it does not hold, so there is one all-reduce more), and the output
matrix by columns, whose logits are gathered at the end.

A rank has ``n_heads / ranks`` query heads and the key/value heads that they read: ``n_kv_heads / ranks`` of them, or one, which
other ranks hold as well, where there are more ranks than key/value heads. From there on a rank's cache no longer shrinks.

Start it with torchrun (NCCL where there are GPUs, else gloo on the CPU)::

    torchrun --nproc-per-node 2 -m attnlab.parallel companion --prompt "def"

or from Python, with ``run``. ``part`` and ``share`` say what a rank holds and sends, without any process.
"""

import argparse
import os
import pickle
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab import checkpoint, loading
from attnlab.checkpoint import parse_dtype, read_config, stored_dtype, stored_name
from attnlab.errors import (
    AttnlabError,
    CapacityError,
    ConfigError,
    InputError,
    RankError,
    first_line,
    ran_out_of_memory,
)
from attnlab.generate import Decoder, generate, prompt_ids, stream
from attnlab.loading import LanguageModel
from attnlab.memory import Model, as_shape, element_bytes, human_bytes, kv_bytes_per_token, n_params
from attnlab.mistral import Mistral, MistralConfig
from attnlab.rotary import interleaved_to_halves
from attnlab.tokenizer import load_tokenizer

TIMEOUT = 20  # seconds that a rank waits for the others in a collective: they compute the same, so they come soon
_START = 180  # until all are there: a busy machine starts one process long before another
_PATIENCE = 3600  # while loading, which may include a download

# The dimension of the stored matrix (outputs, inputs) that is cut; what is not named here, the norms, each rank has whole.
_CUT = {
    "embed": 0,  # (vocabulary, d): by vocabulary
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0,  # by columns: nn.Linear keeps x W's W transposed
    "o_proj": 1, "down_proj": 1,  # by rows
    "lm_head": 0,
}  # fmt: skip


def plan() -> dict[str, ParallelStyle]:
    """What ``parallelize_module`` does with each module of a ``Mistral``."""
    return {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention.q_proj": ColwiseParallel(),
        "blocks.*.attention.k_proj": ColwiseParallel(),
        "blocks.*.attention.v_proj": ColwiseParallel(),
        "blocks.*.attention.o_proj": RowwiseParallel(),  # its output is all-reduced
        "blocks.*.feed_forward.gate_proj": ColwiseParallel(),
        "blocks.*.feed_forward.up_proj": ColwiseParallel(),
        "blocks.*.feed_forward.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),  # its output is gathered
    }


# ---- what a rank holds ------------------------------------------------------------------------------------------------


def possible_ranks(model: Model) -> list[int]:
    """Over how many ranks a model can be cut.

    They divide the query heads, and divide the key/value heads or are a multiple of them, so that every rank has whole query
    heads and what these read. Where the sizes are known (a ``MistralConfig``), they divide ``d_ff`` and the vocabulary too.

    >>> possible_ranks("mistral-7b-v0.3")
    [1, 2, 4, 8, 16, 32]
    """
    shape = as_shape(model)
    sizes = [model.d_ff, model.vocab_size] if isinstance(model, MistralConfig) else []
    return [
        ranks
        for ranks in range(1, shape.n_heads + 1)
        if shape.n_heads % ranks == 0
        and (shape.n_kv_heads % ranks == 0 or ranks % shape.n_kv_heads == 0)
        and all(size % ranks == 0 for size in sizes)
    ]


def check_ranks(model: Model, ranks: int) -> None:
    """Refuse a number of ranks that a model cannot be cut over, and say which numbers would do. Raises ConfigError."""
    possible = possible_ranks(model)
    if ranks not in possible:
        shape = as_shape(model)
        raise ConfigError(
            f"expected one of {', '.join(map(str, possible))} ranks for {shape.name}, whose {shape.n_heads} query heads on "
            f"{shape.n_kv_heads} K/V heads each rank has whole ones of; got {ranks}"
        )


def kv_heads(n_heads: int, n_kv_heads: int, ranks: int, rank: int) -> range:
    """The key/value heads that a rank's query heads read, of all ``n_kv_heads``.

    >>> [list(kv_heads(32, 8, 4, rank)) for rank in range(4)]
    [[0, 1], [2, 3], [4, 5], [6, 7]]
    >>> [list(kv_heads(8, 2, 4, rank)) for rank in range(4)]  # more ranks than K/V heads: ranks 0 and 1 hold the same one
    [[0], [0], [1], [1]]
    """
    group_size, local = n_heads // n_kv_heads, n_heads // ranks  # query heads
    return range(rank * local // group_size, ((rank + 1) * local - 1) // group_size + 1)


def part(name: str, config: MistralConfig, ranks: int, rank: int) -> tuple[slice, slice] | tuple[slice]:
    """Which part of the parameter ``name`` of ``Mistral(config)`` a rank holds, to index the whole one with.

    >>> config = MistralConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=48)
    >>> part("blocks.0.attention.o_proj.weight", config, ranks=2, rank=1)
    (slice(None, None, None), slice(16, 32, None))

    Raises ConfigError for ranks that the model cannot be cut over.
    """
    check_ranks(config, ranks)
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module not in _CUT:
        return (slice(None),)
    if module in ("k_proj", "v_proj"):
        heads = kv_heads(config.n_heads, config.n_kv_heads, ranks, rank)
        return slice(heads.start * config.head_dim, heads.stop * config.head_dim), slice(None)
    size = {
        "embed": config.vocab_size, "lm_head": config.vocab_size, "q_proj": config.n_heads * config.head_dim,
        "o_proj": config.n_heads * config.head_dim,
    }.get(module, config.d_ff)  # fmt: skip
    mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
    return (mine, slice(None)) if _CUT[module] == 0 else (slice(None), mine)


def local_config(config: MistralConfig, ranks: int) -> MistralConfig:
    """What a rank's attention and feed-forward layers are: the same model with fewer heads and a smaller ``d_ff``.

    Raises ConfigError for ranks that the model cannot be cut over.
    """
    check_ranks(config, ranks)
    return config.replace(
        n_heads=config.n_heads // ranks,
        n_kv_heads=max(1, config.n_kv_heads // ranks),
        head_dim=config.head_dim,
        d_ff=config.d_ff // ranks,
    )


@dataclass(frozen=True)
class Share:
    """What one rank holds, and what it sends when every row decodes one token.

    Args:
        n_heads, n_kv_heads: of a layer, on this rank.
        weight_bytes, kv_bytes_per_token: held.
        all_reduces: for one token; each adds up ``d_model`` elements a row.
        payload_bytes: a row's, that the rank puts into the all-reduces and the gathering of logits.
        sent_bytes: what of it goes over the wire if they run as rings, the fewest bytes possible: 2 (ranks − 1) / ranks of
            the payload for an all-reduce, (ranks − 1) times the rank's logits for the gathering.
    """

    ranks: int
    n_heads: int
    n_kv_heads: int
    weight_bytes: int
    kv_bytes_per_token: int
    all_reduces: int
    payload_bytes: int
    sent_bytes: int


def share(model: Model, ranks: int, dtype: str | torch.dtype = "bfloat16") -> Share:
    """The account of one rank, derived from the model's shape.

    >>> [share("mistral-7b-v0.3", ranks).kv_bytes_per_token // 1024 for ranks in (1, 2, 4, 8, 16, 32)]
    [128, 64, 32, 16, 16, 16]

    Raises ConfigError for ranks that the model cannot be cut over, and for a model whose parts are not cut here: latent
    attention, experts, biases.
    """
    shape, size = as_shape(model), element_bytes(dtype)
    check_ranks(model, ranks)
    n_params(shape)  # raises where the parameters are not counted
    weights = shape.weights
    if shape.latent_dim is not None or weights.idle or shape.kv_bias or shape.d_model is None:
        raise ConfigError(
            f"expected a decoder of plain attention and feed-forward layers, as Mistral's; {shape.name} has latent attention, "
            "experts or biases, which are not cut here"
        )
    # All matrices and the vocabulary are cut evenly but W_K and W_V, of which a rank may hold what others hold too.
    tied = weights.embedding < weights.output  # then the accounts keep the one matrix under `other`
    n_kv_heads = max(1, shape.n_kv_heads // ranks)
    keys_and_values = 2 * shape.n_layers * shape.d_model * shape.head_dim  # elements, of one head
    evenly = weights.linear + (weights.output if tied else weights.embedding) - shape.n_kv_heads * keys_and_values
    held = evenly // ranks + n_kv_heads * keys_and_values + weights.other - (weights.output if tied else 0)

    all_reduces = 2 * shape.n_layers + 1 if ranks > 1 else 0
    reduced = all_reduces * shape.d_model * size
    gathered = weights.output // shape.d_model // ranks * size if ranks > 1 else 0  # the rank's logits
    return Share(
        ranks=ranks,
        n_heads=shape.n_heads // ranks,
        n_kv_heads=n_kv_heads,
        weight_bytes=held * size,
        kv_bytes_per_token=kv_bytes_per_token(shape, dtype) * n_kv_heads // shape.n_kv_heads,
        all_reduces=all_reduces,
        payload_bytes=reduced + gathered,
        sent_bytes=2 * (ranks - 1) * reduced // ranks + (ranks - 1) * gathered,
    )


class Traffic(TorchDispatchMode):
    """Counts what a rank says to the others while it is on: ``calls``, the name and the bytes put in of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    @property
    def payload_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.calls)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let it become operations on plain tensors and collectives, which come here again
        name = str(func).removeprefix("_c10d_functional.").split(".")[0]
        collective = getattr(func, "namespace", "") == "_c10d_functional" and not name.startswith(("wait", "_"))
        if collective:
            self.calls.append((name, args[0].nbytes))
        return func(*args, **(kwargs or {}))


# ---- the sharded model ------------------------------------------------------------------------------------------------


@dataclass(repr=False)
class Part(LanguageModel):
    """One rank's part of a model: ``generate``, ``stream`` and ``Decoder`` take it as they take the whole.

    All ranks must make the same calls, since each waits for the others' sums. ``config`` is the whole model's;
    ``model.config`` has this rank's heads, so that ``model.new_cache`` has room for these.
    """

    rank: int
    ranks: int
    bytes_read: int  # of the checkpoint's tensors

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on this rank."""
        return sum(_local(parameter).nbytes for parameter in self.model.parameters())

    def __repr__(self) -> str:
        here = self.model.config
        return (
            f"rank {self.rank} of {self.ranks}: {here.n_heads} query heads on {here.n_kv_heads} K/V heads of {self.name}, "
            f"{human_bytes(self.weight_bytes)} of weights on {self.model.device}, {human_bytes(self.bytes_read)} read"
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedMistral(Mistral):
    """A ``Mistral`` whose matrices are cut: the same forward pass, without gradients.

    Not in torch's inference mode, in which its distributed tensors work out again at every step what they otherwise remember;
    a step takes three times as long. A cache that was made in that mode can only be written in it.
    """

    def forward(self, ids, cache=None, *args, **kwargs):
        bound = cache is not None and cache.k.is_inference()
        with torch.no_grad(), torch.inference_mode(bound):
            return super().forward(ids, cache, *args, **kwargs).clone()  # which waits for the logits to be gathered


def shard(config: MistralConfig, mesh: DeviceMesh) -> ShardedMistral:
    """``Mistral(config)`` cut over the mesh's ranks: shapes alone, without memory, for ``load_part`` to fill.

    Raises ConfigError for ranks that the model cannot be cut over.
    """
    ranks = mesh.size()
    check_ranks(config, ranks)
    # More ranks than K/V heads: as if there were a head for every rank, some of them equal.
    wide = config.replace(n_kv_heads=max(config.n_kv_heads, ranks), head_dim=config.head_dim)
    with checkpoint._ShapesOnly():
        model = ShardedMistral(wide)
    parallelize_module(model, mesh, plan(), src_data_rank=None)  # None: nothing to send, each takes its own part
    model.config = local_config(config, ranks)
    for block in model.blocks:
        block.attention.n_heads, block.attention.n_kv_heads = model.config.n_heads, model.config.n_kv_heads
    return model


def load_part(
    name: str | Path, mesh: DeviceMesh, dtype: str | torch.dtype | None = None, progress: bool = True
) -> Part:
    """This rank's part of a model, which reads only that from the files; all ranks call it together.

    Args:
        name: as ``load`` takes it. Rank 0 looks for it, and brings it from the hub if need be; the others, on whatever
            machine, must find the same folder.
        dtype: as ``load`` takes it.
        progress: a bar, on rank 0.

    Raises:
        ConfigError: ranks that the model cannot be cut over, an unknown dtype.
        CapacityError: a part that does not fit on its device.
        InputError, HubError, CheckpointError: as ``load``.
    """
    rank, ranks, device = dist.get_rank(), mesh.size(), _device(mesh)
    patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE))
    found: list = [None]
    if rank == 0:
        try:
            found = [_find(str(name), device, dtype, progress)]
        except AttnlabError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0, group=patient)
    if isinstance(found[0], AttnlabError):
        raise found[0]
    name, folder, dtype = found[0]
    config = read_config(folder).replace(name=name)
    check_ranks(config, ranks)
    _check_room(config, ranks, dtype, device)
    stored = _checked(folder, config)  # before anything is made in the sizes that a damaged config may give
    model = shard(config, mesh)
    bytes_read = _fill(model, config, stored, mesh, device, dtype, progress and rank == 0)
    tokenizer = load_tokenizer(folder)
    dist.barrier(patient)  # from here on nobody is late by a disk
    dist.destroy_process_group(patient)
    return Part(model.eval(), tokenizer, config, name, rank, ranks, bytes_read)


def _find(name: str, device: torch.device, dtype, progress: bool) -> tuple[str, Path, torch.dtype]:
    """Name, folder and dtype, decided once: what is free at this moment plays a part, and all must decide alike."""
    name, folder = loading.find_folder(name, None, progress)
    if dtype is None:
        return name, folder, loading._best_dtype(read_config(folder), stored_dtype(folder), device)
    return name, folder, parse_dtype(dtype)


def _check_room(config: MistralConfig, ranks: int, dtype: torch.dtype, device: torch.device) -> None:
    together = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))  # parts in one memory
    need, free = together * share(config, ranks, dtype).weight_bytes, loading.free_bytes(device)
    if need > free:
        raise CapacityError(
            f"{config.name} over {ranks} ranks needs {human_bytes(need)} for its weights on {device}, where "
            f"{human_bytes(free)} are free: use more ranks ({', '.join(map(str, possible_ranks(config)))} are possible), a "
            "16-bit dtype, or devices with more memory"
        )


def _checked(folder: Path, config: MistralConfig) -> dict[str, tuple[str, Any]]:
    """What is stored of each parameter of ``Mistral(config)``, and under which name, once all is seen to be there."""
    layout = checkpoint._layout(folder)
    stored = checkpoint._stored_tensors(folder, layout)
    _, names = checkpoint._checked_model(folder, layout, config, stored)
    return {name: (on_disk, stored[on_disk]) for name, on_disk in names.items()}


def _fill(
    model: Mistral, config: MistralConfig, stored: dict[str, tuple[str, Any]], mesh: DeviceMesh, device: torch.device,
    dtype: torch.dtype, bar: bool,
) -> int:  # fmt: skip
    """Put this rank's part of every stored tensor into the model; the bytes that were taken from the files."""
    from tqdm.auto import tqdm

    ranks, rank, read = mesh.size(), dist.get_rank(), 0
    cut = dict(model.named_parameters())
    progress = tqdm(stored.items(), desc=f"loading 1/{ranks} of {config.name}", delay=2, disable=not bar)
    with ExitStack() as opened:
        files: dict[Path, Any] = {}
        for name, (on_disk, tensor) in progress:
            file = tensor.file
            if file not in files:
                files[file] = opened.enter_context(checkpoint._open(file))
            whole = files[file][on_disk] if file.suffix == ".pth" else files[file].get_slice(on_disk)
            mine = whole[part(name, config, ranks, rank)]
            read += mine.nbytes
            if on_disk == stored_name(name, "mistral") and checkpoint._permuted_heads(name, config):
                mine = interleaved_to_halves(mine, mine.shape[0] // config.head_dim)  # a rank has whole heads
            try:
                mine = mine.to(device, dtype, copy=True).contiguous()
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                raise CapacityError(
                    f"rank {rank} has no room for its part of {config.name} on {device} ({first_line(error)}): use more "
                    "ranks, or a 16-bit dtype"
                ) from error
            if isinstance(cut[name], DTensor):
                mine = DTensor.from_local(mine, mesh, cut[name].placements, run_check=False)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(mine, requires_grad=False))
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight  # both are cut by vocabulary
    return read


# ---- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def process_group(
    init_method: str = "env://", rank: int = -1, ranks: int = -1, timeout: float = TIMEOUT
) -> Iterator[DeviceMesh]:
    """The ranks as a mesh, taken down again however the block ends. By default, what torchrun's variables say.

    NCCL where every rank of this machine has a GPU of its own, else gloo between CPU processes, over the loopback device
    where all are on one machine: no network and no name of the host is needed. A rank that waits in a collective for longer
    than ``timeout`` seconds raises.

    Raises ConfigError where torchrun's variables are not there.
    """
    if init_method == "env://" and "RANK" not in os.environ:
        raise ConfigError(
            "expected to be one of several processes: start with `torchrun --nproc-per-node 2 -m attnlab.parallel …`, or from "
            "Python with attnlab.parallel.run"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    kind = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    elif here == int(os.environ.get("WORLD_SIZE", ranks)):
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=_START),
    )
    try:
        mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("ranks",))
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.14
        for group in (dist.group.WORLD, mesh.get_group()):
            set_timeout(timedelta(seconds=timeout), group)
        yield mesh
    finally:
        dist.destroy_process_group()


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


def run(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """``function(mesh, *args)`` in ``ranks`` new processes of this machine; what each returned, in the order of ranks.

    Args:
        function: of a module that can be imported, since a new process has nothing of a notebook's own. In a script, call
            this under ``if __name__ == "__main__":``.
        timeout: seconds that a rank waits for the others in a collective.

    What goes to and fro is pickled. The processes meet over a file and the loopback device. If one dies, the others are
    ended.

    Raises:
        RankError: a rank raised, was killed, or waited too long; the message says which, and why.
        AttnlabError: one that a rank raised, as it was.
        ConfigError: fewer than one rank.
        InputError: a function that a new process cannot import.
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ConfigError(f"expected a number of ranks of 1 or more; got {ranks!r}")
    script = getattr(sys.modules["__main__"], "__file__", None)
    if getattr(function, "__module__", None) == "__main__" and script is None:
        raise InputError(
            f"expected a function of a module: a new process cannot import {function.__name__} from a notebook. Write it to a "
            "file beside the notebook (%%writefile mine.py) and import it from there"
        )
    with tempfile.TemporaryDirectory(prefix="attnlab-ranks-") as folder:
        context = mp.start_processes(
            _rank, (ranks, function, args, folder, timeout), nprocs=ranks, join=False, daemon=True, start_method="spawn"
        )
        try:
            while not context.join(grace_period=2):
                pass
        except mp.ProcessExitedException as error:
            raise _reason(folder, ranks, context.processes, error) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, function: Callable, args: Sequence, folder: str, timeout: float) -> None:
    """What a new process runs. Its reason is on disk before its group goes down, and so before others fail for that."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    path = Path(folder)
    try:
        with process_group(f"file://{path / 'meet'}", rank, ranks, timeout) as mesh:
            try:
                result = pickle.dumps(function(mesh, *args))
            except BaseException as error:
                _leave(path / f"{rank}.error", error)
                raise
            (path / f"{rank}.result").write_bytes(result)
            dist.barrier()  # a rank that is done early must not look like one that died
    except BaseException as error:
        _leave(path / f"{rank}.error", error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _leave(file: Path, error: BaseException) -> None:
    if not file.exists():
        told = error if isinstance(error, AttnlabError) else f"{type(error).__name__}: {error}"
        file.write_bytes(pickle.dumps((time.time(), told, traceback.format_exc())))


def _reason(folder: str, ranks: int, processes: Sequence, error: mp.ProcessExitedException) -> AttnlabError:
    """Why the ranks ended: a kill, or else the first error, since the later ones only say that a peer is gone."""
    ended = "the other ranks were ended"
    for rank, process in enumerate(processes):
        # SIGTERM is what the others get afterwards, unless the first to end had it
        if (
            process.exitcode is not None
            and process.exitcode < 0
            and (process.exitcode != -signal.SIGTERM or rank == error.error_index)
        ):
            by = signal.Signals(-process.exitcode).name
            return RankError(f"rank {rank} of {ranks} was killed by {by}; {ended}")
    left = [(*pickle.loads(file.read_bytes()), int(file.stem)) for file in Path(folder).glob("*.error")]
    if not left:
        return RankError(f"rank {error.error_index} of {ranks} ended with exit code {error.exit_code}; {ended}")
    _, told, trace, rank = min(left, key=lambda entry: entry[0])
    if isinstance(told, AttnlabError):
        return told
    reason = RankError(f"rank {rank} of {ranks} died of {told}; {ended}")
    reason.add_note(trace)
    return reason


# ---- looking at it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What one rank counted of a run. Bytes; ``logits`` are those of the prompt's last position, on the CPU.

    Args:
        cache_bytes, cache_tokens: of its cache, and how many tokens that is room for.
        calls: the collectives of one decode step, by name and bytes put in.
        step_seconds: of one decode step, the median.
    """

    rank: int
    ranks: int
    n_heads: int
    n_kv_heads: int
    bytes_read: int
    weight_bytes: int
    cache_bytes: int
    cache_tokens: int
    calls: list[tuple[str, int]]
    step_seconds: float
    logits: Float[Tensor, " vocab"]
    ids: list[int]
    text: str

    @property
    def payload_bytes(self) -> int:
        """Bytes put into the collectives of one decode step."""
        return sum(nbytes for _, nbytes in self.calls)


def measure(
    mesh: DeviceMesh, name: str, prompt: str, max_new_tokens: int = 16, dtype: str | torch.dtype | None = None
) -> Measured:
    """Load this rank's part of a model, go on from ``prompt`` greedily, and count. For ``run``. Raises as ``load_part``."""
    lm = load_part(name, mesh, dtype)
    ids = prompt_ids(lm, prompt)
    decoder = Decoder(lm.model, len(ids) + max_new_tokens)
    logits = decoder.prefill(torch.tensor([ids]))[0, -1]  # (vocab,)
    with Traffic() as traffic:
        decoder.step(logits.argmax(-1).view(1, 1))
    new_ids, at = [], [time.perf_counter()]
    for id in stream(lm, ids, max_new_tokens):
        new_ids.append(id)
        at.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(at[1:])]  # the first id took a prefill
    here = lm.model.config
    return Measured(
        rank=lm.rank, ranks=lm.ranks, n_heads=here.n_heads, n_kv_heads=here.n_kv_heads, bytes_read=lm.bytes_read,
        weight_bytes=lm.weight_bytes, cache_bytes=decoder.cache.nbytes, cache_tokens=decoder.cache.slots,
        calls=traffic.calls, step_seconds=statistics.median(steps) if steps else 0.0,
        logits=logits.float().cpu().clone(), ids=new_ids,
        text=generate(lm, prompt, max_new_tokens),
    )  # fmt: skip


def all_reduce_seconds(mesh: DeviceMesh, sizes: Sequence[int], repeats: int = 50) -> dict[int, float]:
    """Median seconds of one all-reduce over so many bytes, in float32; for ``run``."""
    device, found = _device(mesh), {}
    for nbytes in sizes:
        tensor, took = torch.zeros(max(1, nbytes // 4), device=device), []
        for _ in range(repeats + 3):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        found[nbytes] = statistics.median(took[3:])  # the first ones make connections
    return found


# ---- torchrun -m attnlab.parallel -------------------------------------------------------------------------------------


def _say(line: str) -> None:
    """With its end in one piece: ``print`` writes two under torchrun, and another rank's may come between."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(args: Sequence[str] | None = None) -> int:
    """What ``torchrun -m attnlab.parallel`` runs in every process; its exit code. The text comes from rank 0."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m attnlab.parallel", description="Go on from a prompt, on several ranks."
    )
    parser.add_argument("model", help='"companion", a folder, or a hub id')
    parser.add_argument("--prompt", default="def", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; higher: more varied")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16")
    asked = parser.parse_args(args)
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        with process_group() as mesh:
            lm = load_part(asked.model, mesh, asked.dtype)
            _say(str(lm))
            seed = [random.getrandbits(31) if asked.seed is None else asked.seed]
            dist.broadcast_object_list(seed, src=0)  # all must choose the same token
            for piece in stream(lm, asked.prompt, asked.max_new_tokens, asked.temperature, seed=seed[0]):
                if lm.rank == 0:
                    print(piece, end="", flush=True)
            if lm.rank == 0:
                print()
    except AttnlabError as error:  # every rank says so: the first that ends takes the others with it
        _say(f"attnlab: rank {rank} of {ranks}: {error}")
        return 2 if isinstance(error, ConfigError | InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
