"""The record format of prepared conversations and preference pairs.

A conversation is one uint32 per token: the token id, with the highest bit set if the token is
learned. Learned are the assistant's messages, except those that are marked as not trained on. A
pair is the length of its chosen side, then the chosen side, then the rejected side, each encoded
like a conversation; only the answers are learned, not the prompt that both sides share.
"""

import numpy as np

SAID = np.uint32(1 << 31)


def encode(ids: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Token ids (T,) and whether each is learned, bool (T,), as uint32 (T,)."""
    return ids.astype(np.uint32) | np.where(learned, SAID, np.uint32(0))


def encode_pair(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """The record of a pair, uint32, from its two encoded sides."""
    return np.concatenate([[np.uint32(len(chosen))], chosen, rejected])
