"""Mamba against Hugging Face's, which runs the recurrence frame by frame, and how its parameters start."""

import pytest
import torch
from torch.nn import functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from cald_speech.mixers import Mamba
from tests.helpers import TOLERANCE, padded_batch, relative_error

WIDTH = 32


def peer(mixer: Mamba, expand: int, **options) -> MambaMixer:
    """Hugging Face's mixer with the weights of ours."""
    config = MambaConfig(hidden_size=WIDTH, expand=expand, use_mambapy=False, **options)
    theirs = MambaMixer(config, layer_idx=0)
    names = {"scan.dt_bias": "dt_proj.bias"}
    state = {names.get(name, name.removeprefix("scan.")): value for name, value in mixer.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("expand", [1, 2])
@torch.no_grad()
def test_is_hugging_faces_mamba(expand):
    mixer = Mamba(WIDTH, 4, expand=expand, bias=False, d_state=5, dt_rank=3, d_conv=3)
    theirs = peer(mixer, expand, state_size=5, time_step_rank=3, conv_kernel=3)
    x, _ = padded_batch((40, 40), WIDTH)
    assert relative_error(mixer(x), theirs(x)) <= TOLERANCE["parity"]


def test_start_of_the_scan():
    mixer = Mamba(WIDTH, 4, d_state=4, expand=2.5)
    scan = mixer.scan
    assert mixer.d_inner == 80 and scan.dt_proj.weight.shape == (80, 2)  # 32 / 16
    assert torch.allclose(scan.A_log.exp(), torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(80, 4))
    dt = F.softplus(scan.dt_bias)
    assert 0.0009 < dt.min() < 0.005 and 0.03 < dt.max() < 0.11


def test_inner_width_of_calds_pythia():
    with torch.device("meta"):
        mixer = Mamba(2048, 8, expand=2.5, bias=False)
    assert mixer.out_proj.weight.shape == (2048, 5120) and mixer.scan.sizes == (128, 16, 16)


def test_an_inner_width_of_nothing_is_named():
    with pytest.raises(ValueError, match="expand: expected more than 0, got 0"):
        Mamba(WIDTH, expand=0)
