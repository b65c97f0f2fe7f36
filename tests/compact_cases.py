"""`Rprop(compact=True)` beside a plain one, and how near they are."""

import torch
from cases import give_gradients, parameters

import tritonopt
from tritonopt.compact import KEY, decoded

SHAPES = [(64,), (33, 5), (2000,), (1,), (), (0,)]


def pair(device="cpu", shapes=SHAPES, **options):
    params = parameters(shapes, device=device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    if "variant" in options:
        plain = tritonopt.Rprop(copies, **options)
    else:
        plain = torch.optim.Rprop(copies, foreach=False, **options)
    return tritonopt.Rprop(params, compact=True, **options), plain, params, copies


def bits(tensor):
    return tensor.view(torch.int32)


def assert_near(ours, theirs, params, copies, steps):
    """Equal signs, and step sizes within 2 ulp per step: none may have been somewhere else."""
    for one, other in zip(params, copies, strict=True):
        if other not in theirs.state:
            assert one not in ours.state
            continue
        entry, expected = ours.state[one], theirs.state[other]
        assert entry.keys() == {"step", KEY} and entry["step"] == expected["step"]
        sign, step_size = decoded(entry[KEY].cpu())
        assert torch.equal(sign, expected["prev"].cpu().sign())
        size = expected["step_size"].cpu()
        assert bool(((step_size - size).abs() <= 2 * steps * 2**-23 * size).all())
        moved = (one - other).detach().abs()
        assert bool((moved <= steps * 2**-22 * (1 + one.detach().abs())).all())


def follow_on(ours, theirs, params, copies, steps):
    for param, twin in zip(params, copies, strict=True):
        twin.data.copy_(param.data)
    for step in range(1, 6):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        assert_near(ours, theirs, params, copies, steps + step)
