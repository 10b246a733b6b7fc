"""From CTC logits to text: greedy, or a beam search with an optional n-gram language model.

Whoever needs a decoder takes a callable (logits, lengths) -> list[str]: `partial(greedy, tokenizer=tokenizer)` is one,
and an instance of `BeamSearch` is another.
"""

import importlib.util
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import Wav2Vec2CTCTokenizer

from cald_speech.errors import UserError
from cald_speech.families.vocabulary import Vocabulary
from cald_speech.ops.lengths import check_lengths, valid_frames

Decoder = Callable[[Tensor, Tensor], list[str]]


def greedy(logits: Tensor, lengths: Tensor, tokenizer: Wav2Vec2CTCTokenizer) -> list[str]:
    """The most probable token of each frame, repeats collapsed, blanks dropped, "|" written as a space.

    The blank is the tokenizer's pad token. Each string equals `tokenizer.decode` of the utterance's best tokens.

    Arguments
    ---------
    logits : (B, T, V) float, before or after a softmax.
    lengths : (B,) integer, frames; what lies beyond is never read.

    Raises
    ------
    ValueError
        for logits or lengths of another shape.

    Example
    -------
    >>> import tempfile
    >>> from cald_speech.data.text import make_processor
    >>> tokenizer = make_processor(tempfile.mkdtemp(), ["AB"]).tokenizer  # <pad> is 0, | 4, A 5, B 6
    >>> frames = torch.tensor([[5, 5, 0, 5, 4, 6, 6, 5], [6, 0, 0, 5, 5, 5, 5, 5]])
    >>> greedy(torch.nn.functional.one_hot(frames).float(), torch.tensor([8, 3]), tokenizer)
    ['AA BA', 'B']
    """
    _check(logits, lengths)
    tokens = logits.argmax(dim=-1)
    previous = tokens.roll(1, dims=1)
    previous[:, :1] = -1
    kept = (tokens != previous) & (tokens != tokenizer.pad_token_id)
    kept &= valid_frames(lengths.to(tokens.device), tokens.size(1))
    # one transfer from the device for the whole batch
    pairs = zip(tokens.tolist(), kept.tolist(), strict=True)
    return [
        tokenizer.decode([token for token, keep in zip(*pair, strict=True) if keep], group_tokens=False)
        for pair in pairs
    ]


class BeamSearch:
    """SpeechBrain's CTC beam search, in Python on the CPU; with `kenlm_path` it adds a word n-gram model.

    A hypothesis is ranked by ln p_ctc, and with a language model by ln p_ctc + alpha * ln p_lm + beta * words. Tokens
    below `token_prune_min_logp` in a frame, and beams more than `-beam_prune_logp` below the best, are dropped. The
    words of the language model must be written in the letters of the tokenizer's vocabulary, upper or lower case.

    Raises
    ------
    UserError
        where kenlm is not installed or the model cannot be read.
    ValueError
        for a tokenizer without a pad token.

    Example
    -------
    >>> import tempfile
    >>> from cald_speech.data.text import make_processor
    >>> search = BeamSearch(make_processor(tempfile.mkdtemp(), ["AB"]).tokenizer, beam_size=8)
    >>> frames = torch.tensor([[5, 5, 0, 5, 4, 6, 6, 5]])
    >>> search(20.0 * torch.nn.functional.one_hot(frames), torch.tensor([8]))
    ['AA BA']
    >>> search
    BeamSearch(beam_size=8)
    """

    def __init__(
        self,
        tokenizer: Wav2Vec2CTCTokenizer,
        *,
        beam_size: int = 100,
        kenlm_path: str | Path | None = None,
        alpha: float = 0.5,
        beta: float = 1.5,
        beam_prune_logp: float = -10.0,
        token_prune_min_logp: float = -5.0,
    ):
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: expected one with a pad token, which is the blank of CTC; got none")
        if beam_size < 1:
            raise UserError(f"expected a beam of at least 1 hypothesis, got {beam_size}: 100 is a usual size.")
        self._description = f"beam_size={beam_size}"
        if kenlm_path is not None:
            _check_letters(Path(kenlm_path), tokenizer)
            _check_kenlm(Path(kenlm_path))
            self._description += f", kenlm_path={str(kenlm_path)!r}, alpha={alpha}, beta={beta}"
        self._lower_case = getattr(tokenizer, "do_lower_case", False)
        # imported late: it takes seconds, and greedy decoding does without it
        from speechbrain.decoders.ctc import CTCBeamSearcher

        try:
            self._searcher = CTCBeamSearcher(
                blank_index=tokenizer.pad_token_id,
                vocab_list=tokenizer.convert_ids_to_tokens(range(max(tokenizer.get_vocab().values()) + 1)),
                space_token=getattr(tokenizer, "word_delimiter_token", " "),
                kenlm_model_path=None if kenlm_path is None else str(kenlm_path),
                alpha=alpha,
                beta=beta,
                beam_size=beam_size,
                beam_prune_logp=beam_prune_logp,
                token_prune_min_logp=token_prune_min_logp,
            )
        except OSError as error:  # what kenlm raises for a file that is not one of its models
            raise UserError(
                f"{kenlm_path}: expected a KenLM model (.arpa or binary), which cannot be read: {error}"
            ) from error

    def __call__(self, logits: Tensor, lengths: Tensor) -> list[str]:
        """The best hypothesis of each utterance; (B, T, V) logits and (B,) lengths in frames, as `greedy`."""
        _check(logits, lengths)
        missing = len(self._searcher.vocab_list) - logits.size(-1)
        if missing < 0:
            raise ValueError(
                f"logits: the tokenizer has {len(self._searcher.vocab_list)} tokens, got {logits.size(-1)}"
            )
        log_probs = logits.float().log_softmax(dim=-1).cpu()
        # A tokenizer may have tokens, such as <s>, for which the head has no output: they get probability 0.
        log_probs = torch.nn.functional.pad(log_probs, (0, missing), value=-torch.inf)
        texts = []
        # One by one and cut to length, because SpeechBrain's relative lengths lose a frame to rounding.
        for frames, length in zip(log_probs, lengths.tolist(), strict=True):
            text = self._searcher(frames[None, :length])[0][0].text
            texts.append(text.lower() if self._lower_case else text)
        return texts

    def __repr__(self) -> str:
        return f"BeamSearch({self._description})"


def _check(logits: Tensor, lengths: Tensor) -> None:
    if logits.dim() != 3:
        raise ValueError(f"logits: expected (B, T, V), got shape {tuple(logits.shape)}")
    check_lengths(lengths, logits.size(0), logits.size(1))


def _check_letters(path: Path, tokenizer: Wav2Vec2CTCTokenizer) -> None:
    """Refuse a model none of whose words can be said; of a binary one nothing can be read without kenlm."""
    if not path.is_file():
        raise UserError(f"{path}: expected a KenLM model (.arpa or binary), but there is no such file.")
    vocabulary = Vocabulary.of(tokenizer)
    with path.open(encoding="utf-8", errors="replace") as file:
        if "data" not in file.readline():
            return
        fields = (line.split() for line in islice(file, 10_000))
        words = [row[1] for row in fields if len(row) in (2, 3) and row[0].startswith("-") and row[1][0] != "<"]
    if words and all(vocabulary.spell(word)[1] for word in words):
        cased = sum(not vocabulary.spell(word, any_case=True)[1] for word in words)
        way_out = "Write its words in the other case" if cased > len(words) / 2 else "Give one of the model's language"
        raise UserError(
            f"{path}: expected an n-gram model of words that the tokenizer writes, and it writes none of its first "
            f"{len(words)}, such as {words[0]!r}: every word would be unknown to it. {way_out}"
        )


def _check_kenlm(path: Path) -> None:
    missing = [name for name in ("kenlm", "pygtrie") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"a beam search with a language model needs the packages kenlm and pygtrie, but {' and '.join(missing)} "
            f"cannot be found: install with `pip install kenlm pygtrie` (it builds with g++ and cmake), or decode "
            f"without a language model."
        )
