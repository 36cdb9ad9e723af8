"""Tokens into text as they come: a piece is given out once its characters are whole.

A token of a byte-level BPE can be a part of a character; what is decoded too early reads U+FFFD.
"""

from __future__ import annotations

from collections.abc import Callable

_PART = "\ufffd"


class TextStream:
    """The text of an answer, piece by piece; together the pieces are the decoded answer.

    Only the end of the answer is decoded again for each token: the tokens of the last piece, which
    tell whether a space belongs before the next, and those after it.

    Args:
        decode: Tokens to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._given: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Take one more token and return the text that is whole with it, or an empty string."""
        self._waiting.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_PART):
            return ""
        self._given, self._waiting = self._waiting, []
        return piece

    def finish(self) -> str:
        """Return what is left; a character of which a part never came reads U+FFFD."""
        piece = self._piece() if self._waiting else ""
        self._given, self._waiting = [], []
        return piece

    def _piece(self) -> str:
        before = self._decode(self._given)
        return self._decode(self._given + self._waiting)[len(before) :]
