"""The grammar of the demo corpus: spoken commands to a voice assistant at home.

There are no words that sound alike (to/two, for/four): from sound alone nobody could tell them apart, and the demo's
small models have no language model.
"""

import numpy as np

ROOM = ("KITCHEN", "BEDROOM", "BATHROOM", "GARAGE", "OFFICE", "GARDEN")
DEVICE = ("LIGHT", "LAMP", "RADIO", "HEATER", "FAN")
OPENING = ("WINDOW", "DOOR", "CURTAINS")
NUMBER = ("THREE", "FIVE", "SIX", "SEVEN", "NINE", "TEN", "ELEVEN", "TWENTY", "THIRTY")
GENRE = ("JAZZ", "ROCK", "DANCE")
CITY = ("LONDON", "PARIS", "MADRID", "BERLIN", "TOKYO")
NAME = ("ANNA", "DAVID", "MARIA", "SUSAN", "VICTOR")
DAY = ("TODAY", "TOMORROW", "TONIGHT", "MONDAY", "FRIDAY", "SUNDAY")
ITEM = ("APPLES", "BANANAS", "EGGS", "LEMONS")
ENDING = ("PLEASE", "NOW", "AGAIN")

# A tuple is a choice, a string is said as it stands. A command has 4 to 8 words, and each line has many more outcomes
# than a test set draws from it: train avoids the test set's word sequences, and must still hear all the words.
COMMANDS: tuple[tuple[str | tuple[str, ...], ...], ...] = (
    ("TURN", ("ON", "OFF"), "THE", ROOM, DEVICE),
    ("SWITCH", "THE", ROOM, DEVICE, ("ON", "OFF")),
    (("OPEN", "CLOSE"), "THE", ROOM, OPENING),
    (("OPEN", "CLOSE"), "THE", OPENING, "AT", NUMBER, DAY),
    ("SET", "THE", ROOM, ("HEATER", "FAN"), "TO", NUMBER, "DEGREES"),
    ("SET", ("A TIMER", "AN ALARM"), "FOR", NUMBER, ("MINUTES", "HOURS")),
    ("WAKE", ("ME", NAME[0], NAME[1]), "AT", NUMBER, DAY),
    ("PLAY", ("SOME", "THE NEXT", "THE LAST"), GENRE, ("MUSIC", "SONG"), "IN", "THE", ROOM),
    ("CALL", NAME, ("AT", "BEFORE", "AFTER"), NUMBER, DAY),
    ("REMIND", NAME, "TO", "CALL", NAME, DAY),
    ("SEND", ("A MESSAGE", "THE LIST"), "TO", NAME, DAY),
    ("ADD", NUMBER, ITEM, "TO", "THE", "LIST"),
    ("TAKE", NUMBER, ITEM, "OFF", "THE", "LIST"),
    ("HOW", "IS", "THE", ("WEATHER", "TRAFFIC"), "IN", CITY, DAY),
    ("FIND", "A", ("TRAIN", "FLIGHT"), "TO", CITY, DAY),
)
ENDING_SHARE = 0.4
LONGEST = 8


def draw_command(generator: np.random.Generator) -> str:
    """Draw one command, in upper case.

    Example
    -------
    >>> draw_command(np.random.default_rng(0))
    'TAKE TEN EGGS OFF THE LIST PLEASE'
    """
    template = COMMANDS[generator.integers(len(COMMANDS))]
    command = " ".join(part if isinstance(part, str) else str(generator.choice(part)) for part in template)
    ending = str(generator.choice(ENDING))
    wants_ending = generator.random() < ENDING_SHARE
    return f"{command} {ending}" if wants_ending and len(command.split()) < LONGEST else command


def vocabulary() -> set[str]:
    """All the words that a command can hold."""
    parts = [part for template in COMMANDS for part in template]
    texts = [text for part in parts for text in ((part,) if isinstance(part, str) else part)]
    return set(ENDING).union(*(text.split() for text in texts))
