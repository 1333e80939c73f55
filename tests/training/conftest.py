import os
import tempfile

import pytest

# Before `datasets` is imported: what it caches goes with the tests.
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="uhr_bat_datasets_"))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """The model folder of `own_data`. Tests only read it."""
    from own_data import make_model_folder

    return make_model_folder(tmp_path_factory.mktemp("small_model"))


@pytest.fixture(scope="session")
def processor(small_folder):
    from uhr_bat.processing_uhr_bat import UHRBatProcessor

    return UHRBatProcessor.from_pretrained(small_folder)
