"""Damaged corpora can be used after all, or end in one paragraph: a short run of `tests.faults.manifests`."""

import pytest

from cald_speech.errors import UserError
from tests.faults.manifests import mutations


@pytest.mark.parametrize("seed", range(10))
def test_a_traceback_never_comes_of_it(tmp_path, seed):
    for number, (_, damage) in enumerate(mutations(seed)):
        (tmp_path / str(number)).mkdir()
        try:
            damage(tmp_path / str(number))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000
