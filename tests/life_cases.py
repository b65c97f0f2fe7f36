"""What may happen in the life of an optimizer, and to all parameters that it ever had."""

import copy
import io
import pickle
from collections import defaultdict

import torch
from torch import Tensor, nn

from tritonopt.device import path

KERNEL = path(torch.device("cpu"))[0] != "eager"  # rounds a square root otherwise
SHAPES = [(), (0,), (1,), (3,), (3,), (2, 3), (2, 3), (2, 3), (2, 2, 3, 2), (1, 3, 1, 2), (70,)]
OPTIONS = {
    "RMSprop": {
        "lr": [0.01, 0.3, 1],
        "alpha": [0.0, 0.5, 0.99],
        "eps": [1e-8, 1e-3],
        "weight_decay": [0, 0.1],
        "momentum": [0, 0, 0, 0.9],
        "centered": [False] if KERNEL else [False, False, False, True],
        "maximize": [False, True],
        "foreach": [None, None, None, True, False],
    },
    "Rprop": {
        "lr": [0.01, 0.3, 100.0],
        "etas": [(0.5, 1.2), (0.1, 3.0)],
        "step_sizes": [(1e-6, 50), (0.02, 0.2)],
        "maximize": [False, True],
        "foreach": [None, None, None, True, False],
    },
}
WITHOUT_STATE = ("lr", "alpha", "eps", "weight_decay", "etas", "step_sizes", "maximize", "foreach")


class Side:
    """One optimizer and all parameters that it ever had; what happens to it is in the methods.

    Both sides live the same life: a method draws from a generator of its own for every event, and
    changes only what belongs to its side.
    """

    def __init__(self, name, cls, foreach, rng, options=OPTIONS):
        self.name, self.cls, self.foreach = name, cls, foreach
        self.options = options[name]
        self.params = []
        self.other = None
        self.kept = []  # what a user may hold: it must not hinder anything
        groups = [self.group(rng) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.3:  # neighbours with the same options
            options = {k: v for k, v in groups[0].items() if k != "params"}
            groups = [{**options, "params": group["params"]} for group in groups]
        self.optimizer = cls(groups, foreach=foreach)
        self.optimizers = [self.optimizer]

    def value(self, name, rng):
        value = rng.choice(self.options[name])
        if name == "foreach" and value is None:
            return self.foreach
        if name == "lr" and rng.random() < 0.2:
            return torch.tensor(float(value))
        return value

    def param(self, rng, shape=None):
        shape = rng.choice(SHAPES) if shape is None else shape
        dtype = rng.choice([torch.float32] * 4 + [torch.float64])
        self.params.append(nn.Parameter(noise(rng, shape, dtype)))
        return self.params[-1]

    def group(self, rng):
        names = rng.sample([*self.options], rng.randint(0, 3))
        options = {name: self.value(name, rng) for name in names}
        return {"params": [self.param(rng) for _ in range(rng.randint(1, 4))], **options}

    def some(self, rng):
        return rng.choice(self.params)

    def entry(self, rng):
        given = [p for p in self.params if self.optimizer.state.get(p)]
        return self.optimizer.state[rng.choice(given)] if given else {}

    # Steps.

    def gradients(self, rng, missing=0.0):
        for param in self.params:
            param.grad = None
            shape, dtype = param.shape, param.dtype
            grad = noise(rng, shape, dtype)
            kind, gone = rng.randint(0, 9), rng.random() < missing
            if kind == 0 and dtype not in (torch.float16, torch.bfloat16):  # there, 0 / 0 is NaN
                grad = torch.zeros_like(grad)
            elif kind == 1:
                grad = torch.stack([grad, grad], -1)[..., 0]
            elif kind == 2 and len(shape) == 4:
                grad = grad.to(memory_format=torch.channels_last)
            elif kind == 3 and len(shape) == 2:
                grad = grad.t().contiguous().t()
            if not gone and param.requires_grad:
                param.grad = grad

    def step(self, rng):
        self.gradients(rng)
        self.optimizer.step()

    def step_with_missing_gradients(self, rng):
        self.gradients(rng, missing=rng.choice([0.3, 0.7]))
        self.optimizer.step()

    def step_without_gradients(self, rng):
        self.gradients(rng, missing=1.0)
        self.optimizer.step()

    def step_again(self, rng):
        self.optimizer.step()

    def step_with_closure(self, rng):
        self.optimizer.zero_grad()

        def closure():
            self.gradients(rng, missing=0.2)
            return 1.0

        assert self.optimizer.step(closure) == 1.0

    def step_another_optimizer(self, rng):
        if self.other is None:
            self.other = self.cls(self.params[:3], lr=0.1, foreach=self.foreach)
            self.optimizers.append(self.other)
        self.gradients(rng, missing=0.2)
        self.other.step()

    def zero_grad(self, rng):
        self.optimizer.zero_grad(set_to_none=rng.random() < 0.5)
        halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.params)
        if halves:
            self.optimizer.zero_grad(set_to_none=True)

    # Parameters.

    def move(self, rng):
        for param in self.params if rng.random() < 0.5 else [self.some(rng)]:
            param.data = param.data.clone()

    def write(self, rng):
        with torch.no_grad():
            self.some(rng).mul_(0.5)

    def exchange(self, rng):
        left = self.some(rng)
        right = rng.choice([p for p in self.params if alike(p, left)])
        if rng.random() < 0.5:
            left.data, right.data = right.data, left.data
        elif left is not right:
            torch.utils.swap_tensors(left, right)

    def tie(self, rng):
        left = self.some(rng)
        right = rng.choice([p for p in self.params if alike(p, left)])
        left.data = right.data

    def cast(self, rng):
        halves = [torch.float16, torch.bfloat16]
        dtype = rng.choice([torch.float32, torch.float64] * 2 + halves)
        for param in self.params if rng.random() < 0.7 else [self.some(rng)]:
            param.grad = None
            param.data = param.data.to(dtype)

    def channels_last(self, rng):
        for param in self.params:
            if param.dim() == 4:
                param.grad = None
                param.data = param.data.to(memory_format=torch.channels_last)

    def freeze(self, rng):
        param = self.some(rng)
        param.requires_grad_(not param.requires_grad)
        if rng.random() < 0.5:
            param.grad = None

    def share(self, rng):
        self.some(rng).share_memory_()
        for value in self.entry(rng).values():
            if rng.random() < 0.5:
                value.share_memory_()

    def hold(self, rng):
        """Aliases that somebody may have: packing must not cut them off."""
        self.kept += [self.some(rng).detach(), self.some(rng).data.unsqueeze(0)]
        self.kept += [value.detach() for value in self.entry(rng).values()]

    # Groups.

    def add_group(self, rng):
        group = self.group(rng)
        if rng.random() < 0.3:  # as the last one
            last = self.optimizer.param_groups[-1]
            group = {**{k: v for k, v in last.items() if k != "params"}, "params": group["params"]}
        self.optimizer.add_param_group(group)

    def remove_group(self, rng):
        if len(self.optimizer.param_groups) > 1:
            self.optimizer.param_groups.pop(rng.randrange(len(self.optimizer.param_groups)))

    def remove_param(self, rng):
        params = rng.choice(self.optimizer.param_groups)["params"]
        if params:
            gone = params.pop(rng.randrange(len(params)))
            if rng.random() < 0.5:
                self.optimizer.state.pop(gone, None)

    def replace_param(self, rng):
        params = rng.choice(self.optimizer.param_groups)["params"]
        if params:
            index = rng.randrange(len(params))
            old = params[index]
            params[index] = self.param(rng, shape=old.shape)
            if rng.random() < 0.5:  # as accelerate does
                entry = self.optimizer.state.pop(old, None)
                if entry is not None and params[index].dtype == old.dtype:
                    self.optimizer.state[params[index]] = entry

    def renew_params(self, rng):
        for group in self.optimizer.param_groups:
            group["params"] = list(group["params"])

    def change_option(self, rng, names=WITHOUT_STATE):
        name = rng.choice([n for n in self.options if n in names])
        value = self.value(name, rng)
        groups = self.optimizer.param_groups
        for group in groups if rng.random() < 0.5 else [rng.choice(groups)]:
            group[name] = value

    def same_options(self, rng):
        first = self.optimizer.param_groups[0]
        for group in self.optimizer.param_groups:
            group.update({k: v for k, v in first.items() if k in WITHOUT_STATE})

    def change_any_option(self, rng):
        self.change_option(rng, [*self.options])

    def write_tensor_lr(self, rng):
        factor = rng.choice([0.5, 2.0])
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(factor)

    # State.

    def clear_entry(self, rng):
        if rng.random() < 0.5:
            self.optimizer.state.pop(self.some(rng), None)
        else:
            self.entry(rng).clear()

    def clear_state(self, rng):
        if rng.random() < 0.5:
            self.optimizer.state.clear()
        else:
            self.optimizer.state = defaultdict(dict)

    def replace_state(self, rng):
        entry = self.entry(rng)
        for key in [key for key in entry if rng.random() < 0.7]:
            kind = rng.randint(0, 3)
            if kind == 0:
                entry[key] = entry[key].clone()
            elif kind == 1:
                entry[key].data = entry[key].data.clone()
            elif kind == 2:
                self.kept.append(entry[key])
                entry[key] = entry[key].detach()
            else:
                entry[key].mul_(0.5)

    def move_what_was_replaced(self, rng):
        current = {id(v) for o in self.optimizers for e in o.state.values() for v in e.values()}
        for tensor in [held for held in self.kept if isinstance(held, Tensor)]:
            if id(tensor) not in current and not any(tensor is p for p in self.params):
                tensor.data = torch.zeros_like(tensor)

    def replace_entry(self, rng):
        for param in [p for p in self.params if p in self.optimizer.state]:
            if rng.random() < 0.5:
                entry = self.optimizer.state[param]
                self.optimizer.state[param] = {key: value.clone() for key, value in entry.items()}

    def keep_entry(self, rng):
        """A dict that torch fills at the first step."""
        self.kept_entry = self.optimizer.state[self.some(rng)]

    # Copies.

    def load_own(self, rng):
        state = self.optimizer.state_dict()
        if rng.random() < 0.5:
            state = copy.deepcopy(state)
        if rng.random() < 0.5:
            entries = sorted(state["state"].items())
            self.kept += [value for _, entry in entries for value in entry.values()]
        self.optimizer.load_state_dict(state)

    def copy(self, rng):
        self.kept = []
        before = dict(vars(self))
        vars(self).update(copy.deepcopy(vars(self)))
        if rng.random() < 0.5:
            self.kept = [before]

    def pickle(self, rng):
        self.kept = []
        live = {"params": self.params, "optimizers": self.optimizers}
        if rng.random() < 0.5:
            live = pickle.loads(pickle.dumps(live))
        else:
            file = io.BytesIO()
            torch.save(live, file)
            file.seek(0)
            live = torch.load(file, weights_only=False)
        vars(self).update(live)
        self.optimizer = self.optimizers[0]
        self.other = self.optimizers[1] if self.other is not None else None
        self.kept_entry = None


def noise(rng, shape, dtype):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def alike(left, right):
    return left.shape == right.shape and left.dtype == right.dtype
