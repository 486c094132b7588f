"""``load()``: from a name to a model and its tokenizer, with the memory asked for first."""

import errno
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from attnlab import companion
from attnlab.checkpoint import load_model, parse_device, parse_dtype, read_config, stored_dtype
from attnlab.companion import COMPANION, SIBLINGS
from attnlab.errors import AttnlabError, CapacityError, CheckpointError, ConfigError, HubError, InputError
from attnlab.files import brief
from attnlab.memory import QUANTIZED, Model, Plan, kv_cache_bytes, n_params, plan, weight_bytes
from attnlab.mistral import Mistral, MistralConfig
from attnlab.quantize import Quantize, is_quantized, parse_quantize, quantizable
from attnlab.tokenizer import Tokenizer, load_tokenizer

_SMALL_CONTEXT = 512  # tokens of cache without which a model is of no use
_CONFIGS = ["config.json", "params.json"]
_OTHER_WAYS = f'Or give the folder of a model you have, or use attnlab.load("{COMPANION}"), which needs no network'


@dataclass(repr=False)
class LanguageModel:
    """A model, the tokenizer it was trained with, its config, and the name it was loaded by."""

    model: Mistral
    tokenizer: Tokenizer
    config: MistralConfig
    name: str

    def __repr__(self) -> str:
        count = n_params(self.config)  # a tied matrix counts once
        size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        dtype = str(self.model.dtype).removeprefix("torch.")
        if form := is_quantized(self.model):
            dtype += f" with {form} weights"
        return f"LanguageModel({self.name!r}, {size} parameters, {dtype} on {self.model.device})"


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    revision: str | None = None,
    quantize: Quantize | None = None,
) -> LanguageModel:
    """A model ready to run.

    Args:
        name: ``"companion"``, the small model that ships with attnlab and needs no network, or one of its siblings
            ``"multi-head"``, ``"grouped-query"``, ``"multi-query"``; a folder in Hugging Face's or
            Mistral's layout; or a hub id such as ``"mistralai/Mistral-7B-Instruct-v0.3"``, downloaded once. A
            connection that breaks is taken up where it stopped; after a kill, files that were complete stay.
        device: None: a CUDA GPU if there is one, else Apple's, else the CPU.
        dtype: what is computed in. None: on a GPU as stored, but float16 for bfloat16 where the GPU cannot compute in
            it (a T4); on a CPU float32, its fastest, if that fits a quarter of the free memory, else as stored.
        progress: bars for what takes longer than two seconds.
        revision: a branch, tag or commit on the hub.
        quantize: what linear weights are stored in: ``"int8"``, half of 16 bits' memory, or ``"int4"``, a third, with
            :mod:`attnlab.quantize`; None: in ``dtype``. They are put there one by one: the whole in 16 bits is never held.

    Raises:
        InputError: a name that is none of these.
        HubError: gated, unknown, or no network.
        CapacityError: the weights do not fit.
        CheckpointError: a folder that is incomplete or damaged, or has no tokenizer.
        ConfigError: an unknown dtype or form of quantizing, sizes that int4 does not divide, a device that is not here.
    """
    quantize = parse_quantize(quantize)
    device = parse_device(_best_device() if device is None else device)
    if dtype is not None:
        dtype = parse_dtype(dtype)
    name, folder = find_folder(str(name), revision, progress)
    config = read_config(folder).replace(name=name)
    dtype = _best_dtype(config, stored_dtype(folder), device, quantize) if dtype is None else dtype
    _check_room(config, dtype, device, quantize)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} tokens, which the model has vectors for; its "
            f"tokenizer has {tokenizer.vocab_size}. It belongs to another model"
        )
    model = load_model(folder, device, dtype, progress, quantize)
    model.config = config
    return LanguageModel(model, tokenizer, config, name)


def what_fits(model: Model = "mistral-7b-v0.3", device: str | torch.device | None = None, context: int = 4096) -> Plan:
    """How to load a model on this machine: as it is, or with int8 or int4 weights; before anything is downloaded.

    ``memory.plan`` with what is free on ``device`` (None: the one ``load`` takes) and with the dtype ``load`` takes for a
    model stored in bfloat16, as Mistral's are. Hand ``chosen.dtype`` and ``chosen.quantize`` to ``load``; if nothing fits,
    ``chosen`` is None, and there is the companion.
    """
    device = parse_device(_best_device() if device is None else device)
    free, dtype = free_bytes(device), _best_dtype(model, torch.bfloat16, device)
    found = plan(model, free, context, dtype=dtype)
    why = {
        torch.float32: ", float32 as there is plenty",
        torch.float16: ", float16 as it does not compute in bfloat16",
    }.get(dtype, "")
    reason = found.reason
    if found.chosen is None:
        reason += f', or "{COMPANION}", which runs anywhere'
    return replace(found, setting=f"{found.setting} free on {device}{why}", reason=reason)


def free_bytes(device: str | torch.device) -> int:
    """Bytes that could still be taken on ``device``, as far as the system says; on macOS, what there is in all.

    On a CPU in a container, its limit counts, not the machine's.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((cgroup / f"memory.{what}").read_text()) for what in ("max", "current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(statistics["inactive_file"]))  # cached files make way
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return free


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _best_dtype(config: Model, stored: torch.dtype, device: torch.device, quantize: str | None = None) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32 if weight_bytes(config, torch.float32, quantize) <= free_bytes(device) / 4 else stored
    if device.type == "cuda" and stored == torch.bfloat16:
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)  # since Ampere; before it is only emulated
        return stored if has_bfloat16 else torch.float16
    return stored


def _check_room(config: MistralConfig, dtype: torch.dtype, device: torch.device, quantize: str | None = None) -> None:
    """Refuse what surely does not fit, before minutes are spent on finding out; name what would."""
    tokens = min(_SMALL_CONTEXT, config.window or _SMALL_CONTEXT)

    def need(dtype: torch.dtype, quantize: str | None) -> int:
        return weight_bytes(config, dtype, quantize) + kv_cache_bytes(config, tokens, 1, dtype)

    free = free_bytes(device)
    if need(dtype, quantize) <= free:
        return
    narrow = torch.bfloat16 if dtype == torch.float32 else dtype
    smaller = [form for form in QUANTIZED if quantize is None or QUANTIZED[form][0] < QUANTIZED[quantize][0]]
    help = []
    for form in [quantize, *filter(partial(quantizable, config), smaller)]:
        for other in (dtype, narrow):
            if need(other, form) <= free:
                options = [f'dtype="{str(other).removeprefix("torch.")}"'] if other != dtype else []
                options += [f'quantize="{form}"'] if form != quantize else []
                help.append(f"{' with '.join(options)}, which needs {need(other, form) / 1e9:.2f} GB")
                break
    if device.type != "cpu" and need(dtype, quantize) <= free_bytes("cpu"):
        help.append('device="cpu"')
    help.append(f'a device with more memory, or a smaller model such as "{COMPANION}"')
    stored = str(dtype).removeprefix("torch.") + (f" with {quantize} weights" if quantize else "")
    raise CapacityError(
        f"{config.name} does not fit on {device}: its weights in {stored} and a cache of "
        f"{tokens} tokens need {need(dtype, quantize) / 1e9:.2f} GB; {free / 1e9:.2f} GB are free. "
        f"What would help: {'; '.join(help)}"
    )


# ---- where a name leads -----------------------------------------------------------------------------------------------


def find_folder(name: str, revision: str | None, progress: bool) -> tuple[str, Path]:
    """The name to show and the folder with the files, which the hub may have to bring first. Raises as ``load`` does."""
    shipped = companion.folder(name)
    folder = shipped or Path(os.path.expanduser(name))
    if shipped or (name and os.path.exists(folder)):  # os.path, which says no where pathlib raises
        if revision is not None:
            raise ConfigError(f"revision={revision!r} names a version on the hub; {name} is a folder on this machine")
        return (name if shipped else folder.resolve().name), folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise InputError(
            f'expected "{COMPANION}", one of its siblings ({", ".join(SIBLINGS)}), a folder, or a hub id like '
            f'"mistralai/Mistral-7B-v0.1"; got {brief(name)}, and there is no folder of that name'
        )
    return name, _download(name, revision, progress)


def _download(repo: str, revision: str | None, progress: bool) -> Path:
    """The snapshot's folder in the hub's cache, with only the files that are needed in it."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=10)
        except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except Exception as error:  # no network, or a hub that is down: what an earlier download left may do
            try:
                return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=_CONFIGS))
            except errors.LocalEntryNotFoundError:
                raise error from None
        wanted = _needed(repo, [file.rfilename for file in info.siblings or []])
        bars = {} if progress else {"tqdm_class": _no_bar()}
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, **bars))
    except AttnlabError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: its owner gives it to those who accept a licence, and no token of somebody who did came "
            f"along. Accept it at https://huggingface.co/{repo}, then log in with `hf auth login` or set HF_TOKEN. "
            f"{_OTHER_WAYS}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the hub knows no model {repo!r}, and there is no folder of that name here. Check the spelling; if it is "
            f"private, log in with `hf auth login` or set HF_TOKEN. {_OTHER_WAYS}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo} has no revision {revision!r}: give a branch, tag or commit that its page lists"
        ) from error
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"the disk is full: {repo} could not be stored in the hub's cache. Free some space, or set HF_HOME to a "
                "folder on another disk"
            ) from error
        first_line = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise HubError(
            f"{repo} could not be had from the hub, which cannot be reached or does not answer as it should "
            f"({first_line}). Check the network and try again: files that came whole are kept. {_OTHER_WAYS}"
        ) from error


def _needed(repo: str, listed: list[str]) -> list[str]:
    """Config, tokenizer, and the weights once: many folders hold them in both layouts, or as safetensors and as .pth."""
    present = [name for name in listed if "/" not in name]
    ways = (  # the first that is there
        ("config.json", r"model\.safetensors"),
        ("config.json", r"model\.safetensors\.index\.json|model-.+\.safetensors"),
        ("params.json", r"consolidated.*\.safetensors"),
        ("params.json", r"consolidated.*\.pth"),
    )
    for config, pattern in ways:
        weights = [name for name in present if re.fullmatch(pattern, name)]
        if config in present and weights:
            break
    else:
        raise CheckpointError(
            f"{repo}: expected config.json with model*.safetensors, or params.json with consolidated*.safetensors or .pth; "
            f"it has {', '.join(present[:8]) or 'no files'}. Look for the model in one of these formats"
        )
    others = r"(config|params)\.json|tokenizer.*|tekken.*\.json|special_tokens_map\.json|chat_template\..*"
    return [name for name in present if name in weights or re.fullmatch(others, name)]


def _no_bar() -> type:
    from tqdm.auto import tqdm

    class NoBar(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    return NoBar
