"""The exceptions that attnlab raises. Every message says what was expected, what came and what to do."""


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
