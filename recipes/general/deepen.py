"""The model that the general teacher begins as: `python recipes/general/deepen.py FOLDER`.

It is the demo's teacher, which has learnt letters from synthesised commands, with six more layers that do nothing yet.
A random model of this size was still on the plateau where CTC says blank when this one had left it (dev/LOG.md).
"""

from pathlib import Path

import click
import torch
from transformers import AutoConfig, AutoProcessor, Wav2Vec2ForCTC

from cald_speech.commands.options import command
from cald_speech.data.text import make_processor
from cald_speech.shipped import recipes_folder

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
NUM_LAYERS = 10


def write_deeper(folder: str | Path, source: str | Path | None = None, *, num_layers: int = NUM_LAYERS) -> Path:
    """Write the model and its processor, for capitals, apostrophe and space, into `folder`: 2.2 million parameters.

    Each new layer adds zero to its input, so that letters that both processors know get the source's logits. `source`
    is a wav2vec2 with a CTC head and fewer layers (None: the demo's teacher).
    """
    source = recipes_folder() / "demo" / "teacher" if source is None else source
    torch.manual_seed(0)
    processor, known = make_processor(folder, [LETTERS]), AutoProcessor.from_pretrained(source).tokenizer.get_vocab()
    vocabulary = processor.tokenizer.get_vocab()
    shallow = Wav2Vec2ForCTC.from_pretrained(source, dtype=torch.float32)
    options = {"num_hidden_layers": num_layers, "vocab_size": len(vocabulary), "dtype": torch.float32}
    model = Wav2Vec2ForCTC(AutoConfig.from_pretrained(source, **options))
    # All of the source is taken over, or this raises; the layers that it has not keep what they began with.
    model.wav2vec2.load_state_dict(model.wav2vec2.state_dict() | shallow.wav2vec2.state_dict())
    with torch.no_grad():
        for layer in model.wav2vec2.encoder.layers[shallow.config.num_hidden_layers :]:
            for last in (layer.attention.out_proj, layer.feed_forward.output_dense):
                last.weight.zero_()
                last.bias.zero_()
        for token in vocabulary.keys() & known.keys():
            model.lm_head.weight[vocabulary[token]] = shallow.lm_head.weight[known[token]]
            model.lm_head.bias[vocabulary[token]] = shallow.lm_head.bias[known[token]]
    model.save_pretrained(folder)
    return Path(folder)


@command()
@click.argument("folder", type=Path)
def main(folder: Path) -> None:
    """Write the model that hparams/general/teacher_start.yaml starts from into FOLDER."""
    write_deeper(folder)


if __name__ == "__main__":
    main()
