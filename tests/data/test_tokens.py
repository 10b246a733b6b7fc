"""Token sets, text packed into them, Megatron's files, and masking."""

import json
import struct

import numpy as np
import pytest
import torch

from cald_speech.data.tables import read_table, write_table
from cald_speech.data.tokens import END, UNLABELLED, Masking, TokenBlocks, TokenSet, pack_texts, train_tokenizer
from cald_speech.errors import UserError
from cald_speech.recipes.pile.megatron import MAGIC, read_index, split_token_file


def write_tokens(path, num_rows=12, row=9, dtype="uint16", seed=0):
    tokens = np.random.default_rng(seed).integers(50, size=(num_rows, row)).astype(dtype)
    tokens.tofile(path)
    return tokens


def write_index(path, lengths, code=8, version=1):
    header = MAGIC + struct.pack("<QBQQ", version, code, len(lengths), len(lengths) + 1)
    path.write_bytes(header + np.array(lengths, dtype="<i4").tobytes() + b"\0" * 16)


# --- token sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64"])
def test_blocks_are_the_file(tmp_path, dtype):
    tokens = write_tokens(tmp_path / "t.bin", dtype=dtype)
    TokenSet(str(tmp_path / "t.bin"), tokens.size, 9, dtype).write(tmp_path / "t.json")
    blocks = TokenBlocks(TokenSet.read(tmp_path / "t.json"))
    assert len(blocks) == 12
    assert all(np.array_equal(blocks[i]["tokens"].numpy(), tokens[i]) for i in range(12))
    assert blocks[3]["tokens"].dtype == torch.int64 and blocks[3]["id"] == "3"


def test_a_set_begins_where_it_says_and_leaves_its_end_out(tmp_path):
    tokens = write_tokens(tmp_path / "t.bin").reshape(-1)
    blocks = TokenBlocks(TokenSet(str(tmp_path / "t.bin"), 25, 10, first=7))
    assert len(blocks) == 2 and blocks[1]["tokens"].tolist() == tokens[17:27].tolist()


def test_the_fingerprint_is_of_tokens_and_not_of_paths(tmp_path):
    tokens = write_tokens(tmp_path / "a.bin")
    tokens.tofile(tmp_path / "b.bin")
    write_tokens(tmp_path / "c.bin", seed=1)
    a, b, c = (TokenSet(str(tmp_path / f"{name}.bin"), tokens.size, 9).fingerprint() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_tokens": 200}, r"at least 400 bytes of uint16 tokens, got 216: it is cut off, or .* another width"),
        ({"dtype": "int64"}, "at least 864 bytes of int64 tokens, got 216"),
        ({"dtype": "float16"}, "dtype: expected one of uint16, int32, uint32, int64, got 'float16'"),
        ({"block_tokens": 200}, "do not fill one block of 200"),
        ({"file": "nowhere.bin"}, "the tokens are not there: nowhere.bin"),
        ({"what": 1}, "expected a token set in JSON"),
    ],
)
def test_sets_that_cannot_be_used(tmp_path, keys, message):
    write_tokens(tmp_path / "t.bin")
    values = {"file": str(tmp_path / "t.bin"), "num_tokens": 108, "block_tokens": 9} | keys
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        TokenSet.read(tmp_path / "t.json")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    write_tokens(tmp_path / "t.bin")
    blocks = TokenBlocks(TokenSet(str(tmp_path / "t.bin"), 108, 9, vocab_size=10))
    with pytest.raises(UserError, match=r"token ids below 10, the size of the vocabulary, got .* in block 0"):
        blocks[0]


# --- Megatron's files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [True, False])
def test_the_end_of_a_token_file_is_held_out(tmp_path, index):
    tokens = write_tokens(tmp_path / "document.bin").reshape(-1)
    if index:
        write_index(tmp_path / "document.idx", [9] * 12)
    sets = split_token_file(tmp_path / "document.bin", TokenSet("", 0, 9), num_held_out_tokens=20)
    rows = {name: [block["tokens"].tolist() for block in map(TokenBlocks(s).__getitem__, range(s.num_blocks))]
            for name, s in sets.items()}  # fmt: skip
    assert {name: len(found) for name, found in rows.items()} == {"train": 8, "valid": 2, "test": 2}
    in_order = rows["train"] + rows["valid"] + rows["test"]
    assert [token for row in in_order for token in row] == tokens.tolist()


def test_the_index_knows_the_width(tmp_path):
    write_tokens(tmp_path / "document.bin", dtype="int32")
    write_index(tmp_path / "document.idx", [9] * 12, code=4)
    assert read_index(tmp_path / "document.idx").row_tokens == 9
    sets = split_token_file(tmp_path / "document.bin", TokenSet("", 0, 9), num_held_out_tokens=9)
    assert sets["train"].dtype == "int32" and sets["train"].num_blocks == 10


def test_a_shard_is_said_to_be_one(tmp_path, caplog):
    write_tokens(tmp_path / "document.bin")
    write_index(tmp_path / "document.idx", [9] * 500)
    sets = split_token_file(tmp_path / "document.bin", TokenSet("", 0, 9), num_held_out_tokens=9)
    assert sets["train"].num_blocks == 10 and "lists 500 rows" in caplog.text and "holds 12" in caplog.text


def test_rows_of_other_lengths(tmp_path):
    write_tokens(tmp_path / "document.bin")
    write_index(tmp_path / "document.idx", [9] * 12)
    with pytest.raises(UserError, match=r"block_tokens: expected 9, .* got 12"):
        split_token_file(tmp_path / "document.bin", TokenSet("", 0, 12), 12)
    write_index(tmp_path / "document.idx", [8, 10] * 6)
    assert read_index(tmp_path / "document.idx").row_tokens == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"MMIDIDY" + b[7:], "expected a Megatron index, which begins with MMIDIDX"),
        (lambda b: b[:20], "expected a Megatron index"),
        (lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "expected version 1 and a dtype from 1 to 8, got version 2"),
        (lambda b: b[:40], "it is cut off: expected the lengths of 12 rows"),
    ],
)
def test_damaged_indices(tmp_path, change, message):
    path = tmp_path / "document.idx"
    write_index(path, [9] * 12)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        read_index(path)


@pytest.mark.parametrize(
    ("row", "held_out", "message"),
    [
        (7, 7, "expected whole rows of 7 uint16 tokens, and its bytes are 15.43 of them"),
        (9, 54, "too few"),
        (9, 3, "too few"),
    ],
)
def test_token_files_that_do_not_fit(tmp_path, row, held_out, message):
    write_tokens(tmp_path / "document.bin")
    with pytest.raises(UserError, match=message):
        split_token_file(tmp_path / "document.bin", TokenSet("", 0, row), held_out)


# --- text ------------------------------------------------------------------------------------------------------------


def test_packed_text_is_the_text(tmp_path):
    texts = ["def one():\n    return 1\n", "ähnlich\n", "\tdef two(): pass"]
    files = [tmp_path / f"{i}.py" for i in range(3)]
    for path, text in zip(files, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer(files, 270, tmp_path / "tokenizer")
    count, dtype = pack_texts(files, tokenizer, tmp_path / "t.bin")
    tokens = np.fromfile(tmp_path / "t.bin", dtype=dtype)
    assert dtype == "uint16" and len(tokens) == count
    assert tokenizer.decode(tokens) == "".join(text + END for text in texts)
    assert tokenizer.get_vocab() == train_tokenizer(files, 270, tmp_path / "again").get_vocab()


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"a\.txt: expected UTF-8 text"):
        train_tokenizer([tmp_path / "a.txt"], 270, tmp_path / "tokenizer")


# --- masking ---------------------------------------------------------------------------------------------------------


def test_masked_tokens_are_labelled_and_others_are_left():
    masking = Masking(0.3, mask_token=100, vocab_size=100, special=(0,))
    tokens = torch.randint(100, (20_000,), generator=torch.Generator().manual_seed(0))
    masked = masking(tokens, seed=1)
    chosen = masked["labels"] != UNLABELLED
    assert torch.equal(masked["labels"][chosen], tokens[chosen])
    assert torch.equal(masked["tokens"][~chosen], tokens[~chosen])
    assert not chosen[tokens == 0].any()
    assert chosen[tokens != 0].double().mean() == pytest.approx(0.3, abs=0.02)
    shares = [(masked["tokens"][chosen] == 100).double().mean(), (masked["tokens"] == tokens)[chosen].double().mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.02)
    assert torch.equal(masking(tokens, seed=1)["tokens"], masked["tokens"])
    assert not torch.equal(masking(tokens, seed=2)["tokens"], masked["tokens"])


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_comes_back(tmp_path):
    rows = [{"text": "a\nb", "label": "x"}, {"text": "c", "pair": "d", "label": "y"}]
    write_table(tmp_path / "t.jsonl", rows)
    assert list(read_table(tmp_path / "t.jsonl").values()) == [{"pair": None} | row for row in rows]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"text": 1, "pair": null, "label": "x"}'])
def test_a_row_that_is_none_is_named(tmp_path, line):
    write_table(tmp_path / "t.jsonl", [{"text": "a", "label": "x"}])
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"t\.jsonl, line 2: expected text, pair"):
        read_table(tmp_path / "t.jsonl")
