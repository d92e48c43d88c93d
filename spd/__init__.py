"""SPD: sync-point drop for tensor-parallel LLaMA models.

from spd import Plan, SPDModel
model = SPDModel.from_pretrained("spd-tiny", tp=8, plan=Plan.dropping(8, attention=[3, 4]))
"""

__version__ = "0.1.0"
__all__ = ["Plan", "SPDError", "SPDModel", "Sampling"]

_HOME = {"Plan": "plan", "SPDError": "errors", "SPDModel": "pretrained", "Sampling": "generate"}


def __getattr__(name: str):
    """The public names, imported when first asked for, so that `import spd` stays instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'spd' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"spd.{_HOME[name]}"), name)
