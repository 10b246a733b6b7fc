"""Forced alignment against torchaudio's over the whole, and what bounds its memory."""

import io
import tracemalloc

import pytest
import torch

from cald_speech.errors import UserError
from cald_speech.longform import alignment
from cald_speech.longform.alignment import align, labels_of
from cald_speech.longform.words import Vocabulary
from tests.longform.chunks import cut

VOCABULARY = Vocabulary(("<pad>", "<unk>", "|", "A", "B", "é"), blank=0, delimiter=2)


def frames_of(spans, num_frames: int) -> torch.Tensor:
    frames = torch.zeros(num_frames, dtype=torch.long)
    for span in spans:
        assert (frames[span.first_frame : span.last_frame + 1] == 0).all()
        frames[span.first_frame : span.last_frame + 1] = span.token
    return frames


def spoken(num_frames: int, num_labels: int, num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    """Noisy logits of a random text spoken at an uneven rate, and the text."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, num_tokens, (num_labels,), generator=generator)
    labels[1::5] = labels[0:-1:5][: len(labels[1::5])]  # equal neighbours
    places = (torch.rand(num_labels, generator=generator) ** 2).sort().values.mul(num_frames - 2 * num_labels).long()
    places += 2 * torch.arange(num_labels)
    logits = torch.randn(num_frames, num_tokens, generator=generator)
    logits[:, 0] += 3.0
    logits[places, labels] += 7.0
    return logits, labels.tolist()


@pytest.mark.parametrize(
    ("num_frames", "num_labels", "num_tokens"), [(30, 1, 3), (50, 20, 5), (200, 60, 4), (1_500, 300, 30)]
)
@pytest.mark.parametrize("ordinary", [True, False], ids=["spoken", "unrelated"])
def test_the_best_path_of_all(num_frames, num_labels, num_tokens, ordinary):
    functional = pytest.importorskip("torchaudio.functional")
    logits, labels = spoken(num_frames, num_labels, num_tokens)
    if not ordinary:
        logits = 3.0 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    expected, _ = functional.forced_align(logits.log_softmax(-1)[None], torch.tensor([labels]), blank=0)
    spans = list(align(cut(logits, 64), labels, 0))
    assert [span.token for span in spans] == labels
    assert torch.equal(frames_of(spans, num_frames), expected[0])
    posteriors = logits.softmax(-1)
    for span in spans:
        mean = posteriors[span.first_frame : span.last_frame + 1, span.token].mean().item()
        assert span.confidence == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("size", [1, 100, 1_024, 3_000])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_chunks_and_storage_do_not_matter(size, on_disk, tmp_path):
    logits, labels = spoken(3_000, 500, 12)
    expected = list(align([(0, logits)], labels, 0))
    assert list(align(cut(logits, size), labels, 0, storage=tmp_path if on_disk else None)) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_band_about_the_path_finds_the_same():
    # the text's first half is spoken in a tenth of the time: the band has to follow it
    logits, labels = spoken(6_000, 900, 12)
    expected = list(align([(0, logits)], labels, 0, band=len(labels)))
    halfway = expected[len(labels) // 2].first_frame
    assert halfway < 0.4 * len(logits)
    assert list(align(cut(logits, 500), labels, 0, band=120)) == expected


def test_a_band_too_narrow_for_the_text_says_so():
    logits, labels = spoken(2_000, 900, 12)
    logits[:1_000] = torch.tensor([9.0, *[0.0] * 11])  # silence; then too little is left within reach of the band
    with pytest.raises(UserError, match="no path within a band of 4 characters"):
        list(align([(0, logits)], labels, 0, band=4))


def test_memory_does_not_grow_with_the_text_times_the_audio(tmp_path):
    def peak(num_frames: int) -> int:
        logits, labels = spoken(num_frames, num_frames // 4, 8)
        tracemalloc.start()  # numpy's arrays are counted, torch's tensors are not
        count = sum(1 for _ in align(cut(logits, 500), labels, 0, band=256, storage=tmp_path))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == num_frames // 4
        return used

    short, long = peak(5_000), peak(20_000)
    text = 15_000 // 4 * 8 * 6  # six numbers for each label more
    assert long - short < 2 * text
    assert long < 4 * 2**20  # a matrix of back-pointers would take 2 * 20,000 * 5,000 bytes = 190 MiB


def test_more_text_than_audio_is_refused():
    with pytest.raises(UserError, match=r"at least 5 frames \(4 characters"):
        list(align([(0, torch.zeros(4, 3))], [1, 1, 2, 1], 0))


def test_no_text_has_no_spans_and_no_audio_no_text():
    assert list(align([(0, torch.zeros(4, 3))], [], 0)) == []
    with pytest.raises(UserError, match="the audio has 0"):
        list(align([], [1], 0))


@pytest.mark.parametrize("labels", [[0], [3], [-1]])
def test_labels_that_are_no_tokens_are_refused(labels):
    with pytest.raises(ValueError, match="tokens"):
        list(align([(0, torch.zeros(4, 3))], labels, 0))


def test_a_full_disk_names_the_need_and_leaves_nothing(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(alignment.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(UserError, match=r"the disk is full .* 40 MB for each hour"):
        list(align([(0, torch.zeros(9, 3))], [1], 0, storage=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="expected a folder that can be written"):
        list(align([(0, torch.zeros(9, 3))], [1], 0, storage=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("text", "labels", "words"),
    [
        ("AB b", [3, 4, 2, 4], ["AB", "b"]),
        ("  A\n\tÉ ", [3, 2, 5], ["A", "É"]),
        ("A, -- B!", [3, 2, 4], ["A,", "B!"]),
        ("|A|", [3], ["|A|"]),
        ("42", [], []),
        ("", [], []),
    ],
)
def test_text_becomes_labels_and_keeps_its_spelling(text, labels, words):
    assert labels_of(text, VOCABULARY, unknown="drop") == (labels, words)


def test_characters_the_model_does_not_write_are_named():
    with pytest.raises(UserError, match=r"does not write: '2' '4'.*unknown='drop'"):
        labels_of("A 42", VOCABULARY)
