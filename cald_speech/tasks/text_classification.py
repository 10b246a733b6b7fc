"""One label for a sentence, or for a pair of them (floor F5)."""

from collections.abc import Sequence

from cald_speech.tasks.classification import Classification
from cald_speech.tasks.sentences import OfSentences


class TextClassification(OfSentences, Classification):
    """The family's own classifier of text, RoBERTa's over the first token; measured in the percentage of wrong labels.

    Arguments
    ---------
    labels : the names of the classes, in the order of the head's outputs.
    max_tokens : of an input, special tokens counted. What is longer is cut, and counted in the log.

    Example
    -------
    >>> task = TextClassification(["negative", "positive"])
    >>> task.score({"0": ("positive", "positive"), "1": ("negative", "positive")})
    50.0
    """

    def __init__(self, labels: Sequence[str], max_tokens: int = 512):
        super().__init__(labels)
        self.max_tokens = max_tokens
