"""A converted model under torch.compile and torch.export: one graph, of any batch and length."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Wav2Vec2Config, Wav2Vec2ForCTC

from cald_speech import LayerMap, convert
from cald_speech.mixers import Bidirectional, Mamba2
from tests.helpers import TOLERANCE, relative_error

AUTO = torch.export.Dim.AUTO


@pytest.fixture(scope="module")
def speech():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    convolutions = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **convolutions, vocab_size=12))
    convert(model, LayerMap(Bidirectional))
    return model.eval()


def padded(batch, num_samples):
    audio, mask = torch.randn(batch, num_samples), torch.ones(batch, num_samples, dtype=torch.long)
    mask[-1, num_samples // 2 :] = 0
    return audio, mask


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_speech_compiles_as_one_graph(speech):
    compiled = torch.compile(speech, backend="eager", fullgraph=True)
    with torch.no_grad():
        for inputs in (padded(2, 8000), padded(2, 8000)[:1]):
            error = relative_error(compiled(*inputs).logits, speech(*inputs).logits)
            assert error <= TOLERANCE["rounding"]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_text_compiles_as_one_graph():
    """Rows padded on either side, or not at all."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).eval()
    convert(model, LayerMap(Mamba2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens = torch.arange(8).view(2, 4)
    with torch.no_grad():
        for row in ([1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]):
            mask = torch.tensor([[1, 1, 1, 1], row])
            expected, actual = (m(tokens, attention_mask=mask, use_cache=False).logits for m in (model, compiled))
            assert relative_error(actual[mask.bool()], expected[mask.bool()]) <= TOLERANCE["rounding"], row


@pytest.mark.slow
@pytest.mark.wide
def test_an_exported_program_takes_any_batch_and_length(speech):
    """And has nothing in it but torch's own operators."""
    shapes = ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO})
    with torch.no_grad():
        program = torch.export.export(speech, padded(2, 8000), dynamic_shapes=shapes)
        graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
        assert not [node for graph in graphs for node in graph.nodes if "cald_speech" in str(node.target)]
        for inputs in (padded(2, 8000), padded(3, 40_000)):
            expected, actual = speech(*inputs).logits, program.module()(*inputs).logits
            assert relative_error(actual, expected) <= TOLERANCE["parity"]
