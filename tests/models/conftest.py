import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports diffusers

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
