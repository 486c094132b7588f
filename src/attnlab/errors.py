"""The exceptions that attnlab raises. Every message says what was expected, what came and what to do."""

import re


class AttnlabError(Exception):
    """Base of every error that attnlab raises on purpose."""


class ShapeError(AttnlabError, ValueError):
    """Tensors whose shapes do not fit together."""


class ConfigError(AttnlabError, ValueError):
    """A setting that cannot work: heads that do not divide, a window of zero, an unknown dtype or device."""


class InputError(AttnlabError, ValueError):
    """Text, ids or a file name that cannot be used."""


class CapacityError(AttnlabError):
    """More was asked for than there is room: a cache that would overflow, memory or disk that would not do."""


class CheckpointError(AttnlabError):
    """A model folder that is incomplete, damaged, or of another architecture."""


class HubError(AttnlabError):
    """A model that could not be had from the hub: gated, unknown, or no network."""


class RankError(AttnlabError):
    """One of several processes that work together died, was killed or did not answer; the others were ended."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python raised it because memory ran out, which torch often tells in words alone."""
    words = r"out of memory|not enough memory|(can't|cannot) allocate memory|ALLOC_FAILED"
    told = isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or bool(told)


def first_line(error: BaseException) -> str:
    """What an error says, without torch's further advice; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
