"""Tokenizers and encoders of text of a few kilobytes, made on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cald_speech.families import families

WORDS = "a dull slow film , and the best of all is it good bad as you like".split()  # noqa: SIM905
SPECIAL = {"roberta": ("<s>", "</s>", "<pad>", "<unk>"), "bert": ("[CLS]", "[SEP]", "[PAD]", "[UNK]")}


def write_tokenizer(folder: Path, kind: str = "roberta") -> PreTrainedTokenizerBase:
    """Words in the special tokens of the ``kind``: <s> a </s></s> b </s> as RoBERTa, [CLS] a [SEP] b [SEP] as BERT."""
    start, end, pad, unknown = SPECIAL[kind]
    tokenizer = Tokenizer(models.WordLevel(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=[start, pad, end, unknown]))
    ids = {token: tokenizer.token_to_id(token) for token in (start, end)}
    make = processors.RobertaProcessing if kind == "roberta" else processors.BertProcessing
    tokenizer.post_processor = make((end, ids[end]), (start, ids[start]))
    names = ["input_ids", "attention_mask"] + ([] if kind == "roberta" else ["token_type_ids"])
    options = {"cls_token": start, "sep_token": end, "pad_token": pad, "unk_token": unknown, "model_input_names": names}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.save_pretrained(folder)
    return fast


def write_encoder(folder: Path, kind: str = "roberta", *, head: str = "masked_lm", **options) -> Path:
    """An encoder with random weights and 64 positions, with its tokenizer."""
    tokenizer = write_tokenizer(folder, kind)
    torch.manual_seed(1)
    config = families()[kind].config_class(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 66 if kind == "roberta" else 64,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,
            **({"type_vocab_size": 1} if kind == "roberta" else {}),
            **options,
        }
    )
    families()[kind].classes[head](config).save_pretrained(folder)
    return folder
