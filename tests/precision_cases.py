"""Parameters in half precision, gradients for them, and the fp32 of which they are halves."""

import torch
from cases import SHAPES

from tritonopt.device import INTERPRET
from tritonopt.precision import joined

PATHS = ["step"] if INTERPRET else ["step", "compile()"]


def random(shapes=SHAPES, device="cpu", dtype=torch.bfloat16):
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def leaves(tensors, dtype=torch.bfloat16):
    return [t.detach().clone().to(dtype).requires_grad_() for t in tensors]


def give(grads, *lists):
    for params in lists:
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype)


def whole(optimizer, param):
    """The fp32 of which a parameter and its remainder are the halves."""
    return joined(param.detach().cpu(), optimizer.state[param]["remainder"].cpu())


def bits(tensor):
    return tensor.detach().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def same(left, right):
    assert left.dtype == right.dtype == torch.float32
    assert torch.equal(bits(left.cpu()), bits(right.cpu()))
