"""Which layers of a model are captured, and why the others are not."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from ..capture import RoutedModule, find_blocks
from ..event_log import log
from ..torch_private import BATCH_NORMS, parameters_of

ROWS_DIFFER = "its rows are not those of the residuals"
USED_ELSEWHERE = "its parameters are used outside its own training forward"
MOVED = "its parameters were replaced or parametrized since the optimizer was made"


class Layers:
    """The layers whose uses are captured: a rule serves them, and nothing but their own forward uses them."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        blocks, self.reasons = find_blocks(model, parameters, affine=True, composite=False)
        wanted = {id(p) for p in parameters}
        self._captured: dict[RoutedModule, dict[str, Tensor | None]] = {}  # with its parameters by name
        for block in blocks:
            module = block.modules[0]  # without composite blocks each has a single one
            if isinstance(module.owner, BATCH_NORMS):
                self.reasons[module.name] = "batch normalisation"
            elif any(id(p) not in wanted for p in trainable(module)):
                self.reasons[module.name] = "some of its parameters are not optimized here"
            else:
                self._captured[module] = dict(parameters_of(module.owner))

    def captured(self) -> list[RoutedModule]:
        """Return the layers to capture now: those whose weight trains and stands where it was."""
        self.give_up([module for module, known in self._captured.items() if _moved(module, known)], MOVED)
        return [module for module in self._captured if module.module.weight.requires_grad]

    def give_up(self, modules: Collection[RoutedModule], reason: str) -> None:
        """Capture some layers no more."""
        in_order = [module for module in self._captured if module in modules]
        for module in in_order:
            del self._captured[module]
            self.reasons[module.name] = reason
        if in_order:
            names = ", ".join(module.name or type(module.owner).__name__ for module in in_order)
            log.warning(
                "GaussNewton: layers differentiated instead of captured, which takes longer: %s (%s)",
                names,
                reason,
            )

    def reason_against(self, parameter: str) -> str:
        """Return why a parameter of the model, given by its name, is not captured."""
        layer = parameter.partition(".parametrizations.")[0]
        names = (parameter.rpartition(".")[0], layer)
        found = (self.reasons[name] for name in names if name in self.reasons)
        return next(found, "its layer's weight is frozen")


def _moved(module: RoutedModule, known: Mapping[str, Tensor | None]) -> bool:
    now = parameters_of(module.owner)
    return now.keys() != known.keys() or any(now[name] is not known[name] for name in known)


def trainable(module: RoutedModule) -> list[Parameter]:
    """Return the parameters of a layer that ask for a gradient."""
    return [p for p in module.parameters if p is not None and p.requires_grad]
