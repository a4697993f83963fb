import torch
from torch import nn

from models.parallelize import parallelize


def test_one_worker_trains_the_model_itself():
    net = nn.Linear(2, 2)
    assert parallelize(net, "single", torch.device("cpu")) is net
