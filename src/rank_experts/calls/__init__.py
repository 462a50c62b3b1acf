"""What a forward knows beyond its tensors: tasks, padding, where losses go, and where it enters a model."""

from .boundary import RoutedForward, install, install_model, uninstall
from .call import Call, current_call
from .padding import token_mask
from .scope import Place, RoutingScope, Tasks
from .use_task import routing_scopes, use_task

__all__ = [
    "Call",
    "Place",
    "RoutedForward",
    "RoutingScope",
    "Tasks",
    "current_call",
    "install",
    "install_model",
    "routing_scopes",
    "token_mask",
    "uninstall",
    "use_task",
]
