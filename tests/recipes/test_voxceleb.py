"""VoxCeleb1 in miniature, in its own layout: prepared, trained under every guidance mode, scored; faults are named."""

import json
import logging

import pytest
import soundfile
import torch
from click.testing import CliRunner

from cald_speech.conversion.model_card import read_facts
from cald_speech.data import manifests
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.recipes.voxceleb import prepare as recipe
from cald_speech.recipes.voxceleb.evaluate import main
from tests.recipes.start import follow_teacher, places, start, write_teacher

SPEAKERS = ["id10001", "id10270", "id11251"]
SETS = {1: 6, 2: 2, 3: 3}  # clips of each speaker
SMALL = {"num_steps": 4, "max_batch_s": 4, "accumulation": 1, "num_workers": 0, "precision": "fp32"}
SMALL |= {"log_every_steps": 1, "switch_step": 2, "layer_map": {"default": {"head_dim": 16, "d_state": 16}}}
SMALL |= {"model_overrides": {"mask_time_prob": 0.05, "mask_time_length": 2}}


def write_voxceleb(root):
    """A tone for each speaker; the second one's clips lie in test/wav, as in the archives, and have 8 kHz."""
    lines = []
    for place, speaker in enumerate(SPEAKERS):
        number = 0
        for which, count in SETS.items():
            for _ in range(count):
                number += 1
                clip, rate = f"{speaker}/vi-deo_{which}/{number:05d}.wav", 8_000 if place == 1 else 16_000
                path = root / ("test/wav" if place == 1 else "dev/wav") / clip
                path.parent.mkdir(parents=True, exist_ok=True)
                times = torch.arange(round((0.4 + 0.01 * number) * rate)) / rate
                soundfile.write(path, (0.3 * torch.sin(times * 1_000 * (place + 1))).numpy(), rate)
                lines.append(f"{which} {clip}")
    (root / "iden_split.txt").write_text("\n".join([*reversed(lines), ""]))
    return root


@pytest.fixture
def corpus(tmp_path):
    return write_voxceleb(tmp_path / "data")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The corpus, an encoder and a teacher that was fine-tuned on it, with its waypoints."""
    folder = tmp_path_factory.mktemp("voxceleb")
    write_voxceleb(folder / "data")
    write_teacher(folder, "voxceleb", SMALL)
    return folder


def test_the_official_split(corpus, tmp_path):
    manifests = recipe.prepare(corpus, tmp_path)
    sets = {name: read_manifest(path) for name, path in manifests.items()}
    assert {name: len(entries) for name, entries in sets.items()} == {"train": 18, "valid": 6, "test": 9}
    assert len(set().union(*sets.values())) == 33
    audio = str(corpus / "test" / "wav" / "id10270" / "vi-deo_2" / "00007.wav")
    assert sets["valid"]["id10270-vi-deo_2-00007"] == {"audio": audio, "duration_s": 0.47, "text": "id10270"}


def test_all_in_one_folder_will_do(corpus, tmp_path):
    (corpus / "wav").mkdir()
    for part in ("dev", "test"):
        for path in (corpus / part / "wav").iterdir():
            path.rename(corpus / "wav" / path.name)
    assert len(read_manifest(recipe.prepare(corpus, tmp_path)["train"])) == 18


def test_work_is_done_once_and_goes_on(corpus, tmp_path, monkeypatch):
    recipe.prepare(corpus, tmp_path, splits=["train"])
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "audio_info", None)
        recipe.prepare(corpus, tmp_path, splits=["train"])
    assert set(recipe.prepare(corpus, tmp_path)) == {"train", "valid", "test"}


def test_another_count_is_a_warning(corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        recipe.prepare(corpus, tmp_path, splits=["valid"])
    assert "valid holds 6 clips" in caplog.text and "has 6904" in caplog.text


def clips(corpus):
    return sorted((corpus / "dev" / "wav" / "id10001" / "vi-deo_1").iterdir())


def lose_split(corpus):
    (corpus / "iden_split.txt").unlink()


def lose_clips(corpus):
    for path in clips(corpus):
        path.unlink()


def cut_clip(corpus):
    clips(corpus)[0].write_bytes(clips(corpus)[0].read_bytes()[:-100])


def append(line):
    path = "iden_split.txt"
    return lambda corpus: (corpus / path).write_text((corpus / path).read_text() + line + "\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_split, r"official split in .*iden_split\.txt, but.*robots\.ox\.ac\.uk"),
        (
            lose_clips,
            r"train: expected 18 clips .* 6 that cannot: (.*no such audio file.*; ){4}.*00002\.wav.* and 1 more",
        ),
        (cut_clip, r"1 that cannot: .*00001\.wav: the audio is cut off, 100 of the.*drop_bad_audio"),
        (append("4 id10001/video/00001.wav"), r"iden_split\.txt:34: expected a line such as .*got '4 id10001/video"),
        (append("1 id10001/00001.wav"), r"iden_split\.txt:34: expected"),
        (append("id10001/video/00001.wav"), r"iden_split\.txt:34: expected"),
        (
            append("3 id10001/vi-deo_1/00001.wav"),
            r"iden_split\.txt:34: .*each clip once, got id10001/vi-deo_1/00001\.wav",
        ),
    ],
)
def test_what_is_bad_is_named(corpus, tmp_path, damage, message):
    damage(corpus)
    with pytest.raises(UserError, match=message) as caught:
        recipe.prepare(corpus, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "manifests" / "train.json").exists()


def test_bad_audio_is_dropped_where_the_user_says_so(corpus, tmp_path, caplog):
    cut_clip(corpus)
    path = clips(corpus)[1].rename(tmp_path / "elsewhere.wav")
    with caplog.at_level(logging.WARNING):
        manifest = recipe.prepare(corpus, tmp_path, drop_bad_audio=True)["train"]
    assert len(read_manifest(manifest)) == 16 and "left out 2 that cannot" in caplog.text
    path.rename(clips(corpus)[0].with_name("00002.wav"))
    assert len(read_manifest(recipe.prepare(corpus, tmp_path, drop_bad_audio=True)["train"])) == 17


def test_there_are_three_sets(corpus, tmp_path):
    with pytest.raises(UserError, match="splits: expected some of train, valid, test, got 'dev'"):
        recipe.prepare(corpus, tmp_path, splits=["dev"])


# The others run with CTC in tests/training, with classes in test_slurp.py.
@pytest.mark.parametrize("guidance", ["hybrid", "waypoint"])
def test_a_student(shared, tmp_path, guidance):
    brain = follow_teacher(shared, "voxceleb", SMALL, tmp_path, guidance)
    assert brain.plain.config.id2label == dict(enumerate(SPEAKERS))


def test_a_teacher_of_other_speakers_is_refused(shared, tmp_path):
    write_voxceleb(tmp_path / "data")
    (tmp_path / "data" / "dev" / "wav" / SPEAKERS[0]).rename(tmp_path / "data" / "dev" / "wav" / "id10002")
    split = tmp_path / "data" / "iden_split.txt"
    split.write_text(split.read_text().replace("id10001", "id10002"))
    keys = {"teacher": str(shared / "teacher" / "model"), "output_folder": str(tmp_path), "guidance": "target"}
    with pytest.raises(
        UserError, match="tells id10001, id10270, id11251 apart, and the task id10002, id10270, id11251"
    ):
        start("voxceleb/student", SMALL | places(tmp_path) | keys)


def test_evaluate(shared, tmp_path, monkeypatch):
    model = shared / "teacher" / "model"
    words = [str(model), "--data_folder", str(shared / "data"), "--output_folder", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    found = json.loads((tmp_path / "test_labels.json").read_text())
    right = sum(label == guess for label, guess in found.values())
    assert len(found) == summary["of"] == 9 and summary["right"] == right
    assert summary["accuracy"] == pytest.approx(100 * right / 9)
    low, high = summary["interval"]
    assert low <= summary["accuracy"] <= high
    assert read_facts(model)["figures"]["test"]["value"] == summary["accuracy"]
    assert json.loads((tmp_path / "test.json").read_text()) == summary
    done = CliRunner().invoke(main, [*words[:2], str(tmp_path), *words[3:]])
    assert done.exit_code == 2 and "iden_split.txt" in done.output
