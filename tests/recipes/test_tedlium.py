"""TED-LIUM 3 in miniature, in its own files: prepared, trained under every guidance mode, scored; faults are named."""

import json
import logging

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from cald_speech.conversion.model_card import read_facts
from cald_speech.data import manifests
from cald_speech.data.audio import SAMPLE_RATE, read_audio, read_entry
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation import recognition
from cald_speech.longform.words import Word
from cald_speech.recipes.tedlium import prepare as recipe
from cald_speech.recipes.tedlium.evaluate import main
from tests.recipes.start import follow_teacher, write_teacher

TALKS = {"train": ["AnnBee_2001", "CarlDee_2002"], "dev": ["EveFox_2003"], "test": ["GusHay_2004", "IdaJoy_2005"]}
# Start and end in seconds, and what is said in between, of each talk; the corpus writes times with two decimals.
SEGMENTS = [
    (0.0, 0.75, "ignore_time_segment_in_scoring"),
    (0.75, 1.5, "ab {BREATH} 's <unk> cad"),
    (1.6, 2.3, "bad(2) cab"),
    (2.3, 3.01, "ace <sil> bed"),
    (3.1, 3.4, "{NOISE} <unk>"),
    (3.4, 4.2, "a cab 's bed"),
]
TIMES = ["00000750-00001500", "00001600-00002300", "00002300-00003010", "00003400-00004200"]
SMALL = {"num_steps": 4, "max_batch_s": 4, "accumulation": 1, "num_workers": 0, "precision": "fp32"}
SMALL |= {"log_every_steps": 1, "switch_step": 2, "layer_map": {"default": {"head_dim": 16, "d_state": 16}}}
SMALL |= {"model_overrides": {"mask_time_prob": 0.05, "mask_time_length": 2}}


def write_talk(split, talk, seed=0):
    """4.2 s of noise whose level says how far it is, as NIST SPHERE, and its STM file."""
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(4.2 * SAMPLE_RATE)) * np.linspace(0.2, 1, 67_200)
    (split / "sph").mkdir(parents=True, exist_ok=True)
    (split / "stm").mkdir(exist_ok=True)
    soundfile.write(split / "sph" / f"{talk}.sph", samples, SAMPLE_RATE, format="NIST", subtype="PCM_16")
    lines = [f"{talk} 1 {talk} {start:.2f} {end:.2f} <o,f0,female> {text}" for start, end, text in SEGMENTS]
    (split / "stm" / f"{talk}.stm").write_text("\n".join([";; a comment", *lines, ""]))


def write_tedlium(root):
    for split, names in TALKS.items():
        for seed, talk in enumerate(names):
            write_talk(root / "TEDLIUM_release-3" / "legacy" / split, talk, seed)
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The corpus, an encoder and a teacher that was fine-tuned on it, with its waypoints."""
    folder = tmp_path_factory.mktemp("tedlium")
    write_tedlium(folder / "data")
    write_teacher(folder, "tedlium", SMALL)
    return folder


@pytest.fixture
def corpus(tmp_path):
    return write_tedlium(tmp_path / "data") / "TEDLIUM_release-3" / "legacy"


def test_segments_are_cut_from_their_talks(corpus, tmp_path):
    manifests = recipe.prepare(corpus.parent, tmp_path)
    assert manifests == {name: tmp_path / "manifests" / f"{name}.json" for name in ("train", "valid")}
    entries = read_manifest(manifests["valid"])
    assert list(entries) == [f"EveFox_2003-{time}" for time in TIMES]
    entry = entries["EveFox_2003-00001600-00002300"]
    audio = str(corpus / "dev" / "sph" / "EveFox_2003.sph")
    seconds = {"start_s": 1.6, "duration_s": 0.7}
    assert entry == {"audio": audio, **seconds, "text": "bad(2) cab", "speaker": "EveFox_2003"}
    samples, _ = soundfile.read(audio, dtype="float32")
    assert np.array_equal(read_entry(entry).numpy(), samples[25_600:36_800])
    assert len(read_manifest(manifests["train"])) == 8


def test_work_is_done_once(corpus, tmp_path, monkeypatch):
    path = recipe.prepare(corpus.parent.parent, tmp_path)["valid"]
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "audio_info", None)
        recipe.prepare(corpus.parent, tmp_path)
    write_talk(corpus / "dev", "KimLee_2006")
    assert len(read_manifest(recipe.prepare(corpus.parent, tmp_path)["valid"])) == 8
    assert path.is_file()


def test_another_count_is_a_warning(corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        recipe.prepare(corpus.parent, tmp_path, splits={"test": "test"})
    assert "test holds 2 talks" in caplog.text and "has 11" in caplog.text
    assert "test holds 10 segments" in caplog.text and "has 1155" in caplog.text


def stm(corpus):
    return corpus / "dev" / "stm" / "EveFox_2003.stm"


def sph(corpus):
    return corpus / "dev" / "sph" / "EveFox_2003.sph"


def append(line):
    return lambda corpus: stm(corpus).write_text(stm(corpus).read_text() + line + "\n")


def rewrite(path, count, rate=SAMPLE_RATE):
    soundfile.write(path, np.zeros(count), rate, format="NIST", subtype="PCM_16")


def lose_everything(corpus):
    corpus.rename(corpus.with_name("elsewhere"))


def lose_split(corpus):
    (corpus / "dev").rename(corpus / "elsewhere")


def lose_talk(corpus):
    write_talk(corpus / "dev", "KimLee_2006")
    sph(corpus).unlink()


def lose_stm(corpus):
    write_talk(corpus / "dev", "KimLee_2006")
    stm(corpus).unlink()


def cut_talk(corpus):
    sph(corpus).write_bytes(sph(corpus).read_bytes()[:-1000])


def spoil_bytes(corpus):
    stm(corpus).write_bytes(b"EveFox_2003 1 EveFox_2003 0.0 1.0 <NA> caf\xe9\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_everything, r"the folder legacy of TED-LIUM 3 in .*openslr\.org/51"),
        (lose_split, r"dev/stm/\*\.stm in .*openslr\.org/51"),
        (
            lose_talk,
            r"dev: .*1 talks and segments .*EveFox_2003\.sph: there is no such.*openslr\.org/51.*drop_bad_audio",
        ),
        (lose_stm, r"1 talks without one: .*EveFox_2003\.sph.*openslr\.org/51"),
        (cut_talk, r"1 talks and .*EveFox_2003\.sph: the audio is cut off, 1000 of the"),
        (lambda corpus: rewrite(sph(corpus), 33_600, 8_000), r"EveFox_2003\.sph: expected 16000 Hz, but it has 8000"),
        (
            lambda corpus: rewrite(sph(corpus), 48_000),
            r"1 talks and .*EveFox_2003\.stm:7: the segment ends at 4\.2 s, but",
        ),
        (append("EveFox_2003 1 EveFox_2003 4.0 4.01 <NA> a"), r"stm:8: the segment is shorter than one frame"),
        (append("EveFox_2003 1 EveFox_2003 2.0"), r"EveFox_2003\.stm:8: expected <recording> .*got 'EveFox"),
        (append("EveFox_2003 1 EveFox_2003 two 3 <NA> a"), r"EveFox_2003\.stm:8: expected <recording>"),
        (append("EveFox_2003 1 EveFox_2003 2.0 3.0 no labels"), r"EveFox_2003\.stm:8: expected <recording>"),
        (append("EveFox_2003 1 EveFox_2003 3.0 2.0 <NA> a"), r"stm:8: expected 0 <= start < end, got 3\.0 and 2\.0"),
        (append("EveFox_2003 1 EveFox_2003 1.6 2.3 <NA> a"), r"stm:8: the talk has this segment twice"),
        (spoil_bytes, r"EveFox_2003\.stm:\d+: expected an STM file in UTF-8"),
    ],
)
def test_what_is_bad_is_named(corpus, tmp_path, damage, message):
    damage(corpus)
    with pytest.raises(UserError, match=message) as caught:
        recipe.prepare(corpus.parent, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "manifests" / "valid.json").exists()


def test_bad_audio_is_dropped_where_the_user_says_so(corpus, tmp_path, caplog):
    lose_talk(corpus)
    rewrite(corpus / "dev" / "sph" / "KimLee_2006.sph", 48_000)
    with caplog.at_level(logging.WARNING):
        path = recipe.prepare(corpus.parent, tmp_path, drop_bad_audio=True)["valid"]
    entries = read_manifest(path)
    assert list(entries) == [f"KimLee_2006-{time}" for time in TIMES[:3]]
    # two decimals more than the talk has: no fault, and cut there
    assert entries["KimLee_2006-00002300-00003010"]["duration_s"] == 0.7
    assert "left out 2 talks and segments" in caplog.text
    with pytest.raises(UserError, match="2 talks and segments"):
        recipe.prepare(corpus.parent, tmp_path)


# The others run with CTC in tests/training, with classes in test_slurp.py.
@pytest.mark.parametrize("guidance", ["hybrid", "waypoint"])
def test_a_student(shared, tmp_path, guidance):
    brain = follow_teacher(shared, "tedlium", SMALL, tmp_path, guidance)
    assert brain.models.conversion.layers == ("Bidirectional", "Bidirectional")
    assert set(brain.models.processor.tokenizer.get_vocab()) >= set("'ABCDE")


@pytest.fixture
def evaluate(monkeypatch):
    """The recipe's command."""
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


def test_evaluate_by_segments(shared, tmp_path, evaluate):
    model = shared / "teacher" / "model"
    done = evaluate(model, "--data_folder", shared / "data", "--output_folder", tmp_path)
    assert done.exit_code == 0, done.output
    summaries = json.loads(done.stdout.splitlines()[-1])
    assert [summaries[split]["num_utterances"] for split in ("dev", "test")] == [4, 8]
    assert summaries["dev"]["words"]["count"] == 9 and summaries["dev"]["normaliser"] == "tedlium"
    assert read_facts(model)["results"]["test"]["wer"] == summaries["test"]["wer"]
    references = [json.loads(line)["reference"] for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    assert references == ["AB'S CAD", "BAD CAB", "ACE BED", "A CAB'S BED"]


def test_evaluate_whole_talks(shared, tmp_path, evaluate, monkeypatch):
    said = [Word("uh", 0.1, 0.3, 1.0, ()), Word("ab's", 0.7, 1.1, 1.0, ()), Word("cad", 1.1, 1.5, 1.0, ())]
    said += [Word("um", 1.5, 1.59, 1.0, ()), Word("bad", 1.5, 1.9, 1.0, ()), Word("so", 3.2, 3.3, 1.0, ())]
    said += [Word("bed", 3.8, 4.2, 1.0, ())]
    words = [
        "--data_folder",
        shared / "data",
        "--output_folder",
        tmp_path,
        "--split",
        "dev",
        "--whole_talks",
        "--force",
    ]
    real = evaluate(shared / "teacher" / "model", *words)
    assert real.exit_code == 0, real.output
    assert json.loads(real.stdout.splitlines()[-1])["dev-talks"]["num_utterances"] == 1
    monkeypatch.setattr(recognition, "transcribe", lambda model, audio, **options: iter(said))
    done = evaluate(shared / "teacher" / "model", *words)
    summary = json.loads(done.stdout.splitlines()[-1])["dev-talks"]
    assert summary["words_outside"] == 3 and summary["longest_audio_s"] == 4.2
    (line,) = (tmp_path / "dev-talks.jsonl").read_text().splitlines()
    talk = json.loads(line)
    assert talk["id"] == "EveFox_2003" and talk["hypothesis"] == "AB'S CAD BAD BED"
    assert talk["reference"] == "AB'S CAD BAD CAB ACE BED A CAB'S BED"
    assert summary["words"]["deletions"] == 5 and summary["words"]["insertions"] == 0


def test_whole_talks_need_linear_time(shared, tmp_path, evaluate):
    done = evaluate(
        *(shared / "teacher" / "model", "--data_folder", shared / "data", "--output_folder", tmp_path),
        *("--split", "dev", "--whole_talks"),
    )
    assert done.exit_code == 2 and "--force" in done.output


def test_whole_talks_are_whole(shared, corpus, tmp_path):
    manifest = recipe.prepare(corpus.parent, tmp_path)["valid"]
    cut_talk(corpus)
    with pytest.raises(UserError, match=r"EveFox_2003\.sph: the audio is cut off"):
        recognition.evaluate_talks(shared / "teacher" / "model", manifest, tmp_path, split="dev", force=True)
    assert not (tmp_path / "dev.json").exists()


def test_a_segment_of_a_long_talk_takes_no_more_than_itself(tmp_path, monkeypatch):
    """The talk is never read whole: what is decoded is as long as the segment."""
    rewrite(tmp_path / "long.sph", 60 * SAMPLE_RATE)
    decoded, read = [], soundfile.SoundFile.read

    def counted(self, *args, **options):
        decoded.append(read(self, *args, **options))
        return decoded[-1]

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert read_audio(tmp_path / "long.sph", start_s=50.0, duration_s=1.5).shape == torch.Size([24_000])
    assert [len(part) for part in decoded] == [24_000]
