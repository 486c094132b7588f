"""attnlab: attention, from the dot product to Mistral 7B."""

from attnlab import exercises, memory
from attnlab.attention import causal_mask, online_softmax_attention, scaled_dot_product_attention
from attnlab.cache import KVCache, RollingKVCache
from attnlab.errors import AttnlabError
from attnlab.generate import generate, stream
from attnlab.layers import GroupedQueryAttention, RMSNorm, SwiGLU, TransformerBlock
from attnlab.loading import LanguageModel, load
from attnlab.mistral import Mistral, MistralConfig
from attnlab.record import AttentionRecord, record_attention

__version__ = "0.1.0"


def explore(record: AttentionRecord, **options):
    """Look at every head of a record: the explorer of :mod:`attnlab.explorer.attention`, for a cell or ``.save_html(path)``."""
    from attnlab.explorer import AttentionExplorer  # widgets only where they are wanted

    return AttentionExplorer(record, **options)
