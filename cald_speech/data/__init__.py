"""Data (floor F4): audio, transcripts and text, from files to the batches that training reads.

Audio goes from ``audio`` (samples of a file) and ``manifests`` (the utterances of a set; what preparations share) to
``dataset`` (items with labels, made by ``text``); ``joining`` makes several utterances one. Text goes from ``tables``
(sentences with a label) or ``tokens`` (blocks of a long row). ``batching`` makes batches of either.
"""
