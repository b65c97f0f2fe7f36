"""RMSprop of other libraries: the same rule as ours with some options, recognised by name."""

from typing import Any

TENSORFLOW_LIKE = (
    "timm.optim.rmsprop_tf.RMSpropTF",
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike",
)
OPTIONS = {  # all that torch does not have, as both have them
    "eps_in_sqrt": True, "initial_scale": 1.0, "lr_in_momentum": False,
    "nesterov": False, "bias_correction": False, "decoupled_weight_decay": False, "nan_safe": False,
    "cautious": False,
}  # fmt: skip
TIMM_ALONE = {  # and what ours has for it
    "decoupled_decay": "decoupled_weight_decay", "caution": "cautious",
    "corrected_weight_decay": "decoupled_weight_decay alone",
}  # fmt: skip


def from_timm(group: dict[str, Any]) -> dict[str, Any]:
    """A param group of timm's `RMSpropTF` as one of ours; any other as it is.

    Raises:
        ValueError: an option is on that ours does not have.
    """
    if not group.keys() >= {"decoupled_decay", "lr_in_momentum"} or "eps_in_sqrt" in group:
        return group
    decoupled = bool(group["decoupled_decay"])
    if group.get("corrected_weight_decay") and decoupled:
        raise ValueError(
            "tritonopt has no corrected_weight_decay, with which timm's RMSpropTF trains here"
        )
    ours = {name: group[name] for name in group if name not in (*TIMM_ALONE, "max_lr_snapshot")}
    ours.update(OPTIONS, foreach=None)  # which selects their own code there
    ours.update(lr_in_momentum=bool(group["lr_in_momentum"]), decoupled_weight_decay=decoupled)
    ours.update(cautious=bool(group.get("caution")))
    return ours


def like_tensorflow(group: dict[str, Any]) -> dict[str, Any]:
    """A param group of one of the two, with what torch's `RMSprop` wants in its groups."""
    made = from_timm(group)
    options = OPTIONS if made is group else {}  # of Stable-Baselines3
    return {**made, **options, "foreach": None, "maximize": False}
