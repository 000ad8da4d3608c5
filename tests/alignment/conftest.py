from __future__ import annotations

import importlib.util
import warnings

import pytest


@pytest.fixture(scope="session")
def trl():
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl")
    with warnings.catch_warnings():  # what TRL and its dependencies warn about when they are imported is theirs
        warnings.simplefilter("ignore")
        import trl
        import trl.experimental.cpo
        import trl.experimental.orpo
        import trl.experimental.tpo

        _ = (trl.DPOTrainer, trl.KTOTrainer, trl.experimental.cpo.CPOTrainer, trl.experimental.orpo.ORPOTrainer)
        _ = trl.experimental.tpo.TPOTrainer
    return trl
