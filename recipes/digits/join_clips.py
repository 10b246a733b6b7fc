"""From a digit string to its sound."""

from collections.abc import Callable

import torch
from torchaudio.functional import resample

from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.recipes.digits.digit_strings import DigitString


def join(string: DigitString, load: Callable[[str], torch.Tensor], *, perturb: bool = False) -> torch.Tensor:
    """Join the clips of `string` with its pauses: (N,) float32 at 16 kHz, over low noise that never stops.

    The noise, 40 to 55 dB below full scale, covers clips and pauses alike, so that no edge tells where a clip begins.
    With `perturb`, each clip is played at 0.8 to 1.2 of its speed: five speakers with 400 clips each are few voices.
    """
    if perturb:
        speeds = iter(torch.randint(16, 25, (len(string.clips),), generator=_generator(string, stream=1)).tolist())
        original = load

        def load(clip: str) -> torch.Tensor:
            return resample(original(clip), next(speeds), 20)

    parts = [torch.zeros(round(string.gaps_s[0] * SAMPLE_RATE))]
    for clip, gap_s in zip(string.clips, string.gaps_s[1:], strict=True):
        parts += [load(clip), torch.zeros(round(gap_s * SAMPLE_RATE))]
    speech = torch.cat(parts)
    generator = _generator(string, stream=0)
    level_db = -40 - 15 * torch.rand((), generator=generator)
    return speech + 10 ** (level_db / 20) * torch.randn(speech.shape, generator=generator)


def _generator(string: DigitString, *, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(string.noise_seed + stream)
