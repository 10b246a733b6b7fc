"""Greedy and beam decoding against transformers' own decoder and hand-made logits."""

import importlib.util

import pytest
import torch

from cald_speech.data.text import make_processor
from cald_speech.errors import UserError
from cald_speech.tasks.decoding import BeamSearch, greedy


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"), ["ABCDE"]).tokenizer


def peaked(tokenizer, *texts: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose best tokens are the characters of each text ("_" is the blank), and their lengths."""
    ids = [[tokenizer.pad_token_id if c == "_" else tokenizer.convert_tokens_to_ids(c) for c in text] for text in texts]
    longest = max(map(len, ids))
    frames = torch.tensor([row + [tokenizer.convert_tokens_to_ids("E")] * (longest - len(row)) for row in ids])
    logits = 20.0 * torch.nn.functional.one_hot(frames, len(tokenizer))
    return logits, torch.tensor([len(text) for text in texts])


def test_greedy_is_what_the_tokenizer_decodes(tokenizer):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 50, len(tokenizer), generator=generator)
    # repeats and blanks abound
    logits = logits.repeat_interleave(2, dim=1)
    logits[..., tokenizer.pad_token_id] += 1.0
    lengths = torch.randint(0, 101, (20,), generator=generator)
    expected = [tokenizer.decode(row[:n].argmax(-1).tolist()) for row, n in zip(logits, lengths, strict=True)]
    assert greedy(logits, lengths, tokenizer) == expected


def test_greedy_never_reads_padding(tokenizer):
    logits, lengths = peaked(tokenizer, "CAB", "ADD_D|BEE_E")
    logits[0, 3:] = torch.nan
    assert greedy(logits, lengths, tokenizer) == ["CAB", "ADD BEE"]


def test_beam_search_agrees_with_greedy_on_peaked_logits(tokenizer):
    logits, lengths = peaked(tokenizer, "CCC_AA_B|A_D_D|||B_E_E", "A", "__|__", "BA|")
    logits[1, 1:] = torch.nan
    assert BeamSearch(tokenizer, beam_size=10)(logits, lengths) == greedy(logits, lengths, tokenizer)
    assert greedy(logits, lengths, tokenizer) == ["CAB ADD BEE", "A", "", "BA"]


def test_beam_search_sums_over_paths_where_greedy_does_not(tokenizer):
    # "A" by way of A_, _A and AA is likelier than the single best path, which is all blank
    logits = torch.full((1, 2, len(tokenizer)), -30.0)
    logits[..., tokenizer.pad_token_id] = 0.55
    logits[..., tokenizer.convert_tokens_to_ids("A")] = 0.45
    lengths = torch.tensor([2])
    assert greedy(logits, lengths, tokenizer) == [""]
    assert BeamSearch(tokenizer)(logits, lengths) == ["A"]


def test_every_length_keeps_its_last_frame(tokenizer):
    # SpeechBrain's relative lengths would round some of these down
    texts = ["A" * n + "B" for n in range(60)]
    logits, lengths = peaked(tokenizer, *texts)
    expected = ["B"] + ["AB"] * 59
    assert BeamSearch(tokenizer, beam_size=2)(logits, lengths) == expected == greedy(logits, lengths, tokenizer)


def test_a_head_narrower_than_the_tokenizer_decodes(tokenizer):
    logits, lengths = peaked(tokenizer, "CAB")
    assert BeamSearch(tokenizer)(logits[..., :-1], lengths) == ["CAB"]
    with pytest.raises(ValueError, match="the tokenizer has"):
        BeamSearch(tokenizer)(torch.zeros(1, 3, len(tokenizer) + 1), lengths)


def test_a_language_model_in_the_other_case_is_refused(tokenizer, tmp_path):
    """Every word would be unknown to it, and the search would say nothing."""
    (tmp_path / "lm.arpa").write_text(
        "\\data\\\nngram 1=3\n\n\\1-grams:\n-1\t<unk>\t0\n-1\tcab\t0\n-2\tba\t0\n\\end\\\n"
    )
    with pytest.raises(UserError, match=r"lm\.arpa: expected .* such as 'cab'.* in the other case"):
        BeamSearch(tokenizer, kenlm_path=tmp_path / "lm.arpa")


def test_missing_kenlm_says_how_to_get_it(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "lm.arpa").write_text("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install kenlm"):
        BeamSearch(tokenizer, kenlm_path=tmp_path / "lm.arpa")


def test_missing_language_model_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.arpa: expected a KenLM model"):
        BeamSearch(tokenizer, kenlm_path=tmp_path / "nowhere.arpa")


ARPA = r"""\data\
ngram 1=5
ngram 2=4

\1-grams:
-9	<unk>	0
-99	<s>	0
-1	</s>	0
-0.3	CAB	0
-3	CAD	0

\2-grams:
-0.1	<s> CAB
-4	<s> CAD
-0.1	CAB </s>
-0.1	CAD </s>

\end\
"""


def test_language_model_changes_the_choice(tokenizer, tmp_path):
    pytest.importorskip("kenlm", reason="beam search with a language model needs the kenlm package: pip install kenlm")
    pytest.importorskip(
        "pygtrie", reason="beam search with a language model needs the pygtrie package: pip install pygtrie"
    )
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA)
    logits, lengths = peaked(tokenizer, "CAD")
    logits[0, 2, tokenizer.convert_tokens_to_ids("B")] = 19.0
    assert BeamSearch(tokenizer)(logits, lengths) == ["CAD"]
    assert BeamSearch(tokenizer, kenlm_path=path, alpha=1.0)(logits, lengths) == ["CAB"]
    path.write_text("not a language model")
    with pytest.raises(UserError, match="cannot be read"):
        BeamSearch(tokenizer, kenlm_path=path)
