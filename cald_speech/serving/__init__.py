"""A model served over HTTP as OpenAI's clients expect it, live over a WebSocket, and as one page (floor F7).

In the order of a request: ``upload`` takes a form from the network into an unnamed file, ``asked`` says what the form
asks for, ``work`` keeps requests in line and ends those whose clients left, ``transcripts`` makes the answer; ``live``
is one client who is speaking; ``app`` has the addresses, and runs the server. Needs the extra ``serve``.
"""

from cald_speech.serving.app import Settings, create_app, run_server
from cald_speech.serving.asked import Refused
from cald_speech.serving.live import LiveSettings

__all__ = ["LiveSettings", "Refused", "Settings", "create_app", "run_server"]
