"""Tensors of every dtype and form."""

import torch

TENSORS = {
    "float32": torch.tensor([[0.1, -0.0], [1e-45, 3e38]]),
    "float64": torch.tensor([5e-324, 0.1], dtype=torch.float64),
    "float16": torch.tensor([6e-8, 65504.0], dtype=torch.float16),
    "bfloat16": torch.tensor([0.1, 3e38, -1.0], dtype=torch.bfloat16),
    "float8": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
    "complex64": torch.tensor([1 + 2j]),
    "int64": torch.tensor([2**53 + 1]),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
}
