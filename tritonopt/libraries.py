"""RMSprop of other libraries: the same rule as ours with some options, recognised by name."""

from typing import Any

TENSORFLOW_LIKE = (
    "timm.optim.rmsprop_tf.RMSpropTF",
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike",
)

_OPTIONS = {"eps_in_sqrt": True, "initial_scale": 1.0}  # of both
_NOT_OURS = ("caution", "corrected_weight_decay")
_TIMM = (*_NOT_OURS, "max_lr_snapshot", "decoupled_decay", "lr_in_momentum")


def from_timm(group: dict[str, Any]) -> dict[str, Any]:
    """A param group of timm's `RMSpropTF` as one of ours; any other as it is.

    Raises:
        ValueError: an option is on that ours does not have.
    """
    if "decoupled_decay" not in group:
        return group
    for name in _NOT_OURS:
        if group.get(name):
            raise ValueError(f"tritonopt has no {name}, which timm's RMSpropTF trains with here")
    ours = {name: value for name, value in group.items() if name not in _TIMM}
    ours.update(_OPTIONS, foreach=None)  # which selects their own code there
    if group["lr_in_momentum"] and group["momentum"] > 0:
        ours["lr_in_momentum"] = True
    if group["decoupled_decay"]:
        ours["decoupled_weight_decay"] = True
    return ours


def like_tensorflow(group: dict[str, Any]) -> dict[str, Any]:
    """A param group of one of the two, with what torch's `RMSprop` wants in its groups."""
    return {"foreach": None, "maximize": False, **from_timm(group), **_OPTIONS}
