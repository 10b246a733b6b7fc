"""What stands in a converted layer where its attention stood."""

from typing import Any

from torch import Tensor, nn

from cald_speech.families.lengths import Lengths
from cald_speech.mixers import Mixer


class MixerSlot(nn.Module):
    """Hugging Face's call on the outside, a mixer on the inside."""

    def __init__(self, mixer: Mixer, context: Lengths):
        super().__init__()
        self.mixer = mixer
        self.context = context

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to (B, T, D) and no attention weights. Lengths come from the context, masks are not looked at."""
        return self.mixer(hidden_states, self.context.frames), None
