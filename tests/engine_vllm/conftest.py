import pytest
from models import save_tiny
from serving import SHAPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), **SHAPE)
