"""The work of every kernel that a piece of code asks of a GPU, counted on tensors without data."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bench.gpu.meta import meta
from bench.kernels.ceilings import Ceilings
from bench.kernels.descriptions import ARITHMETIC, DESCRIPTIONS, Described
from bench.kernels.roofline import Work
from fngd_kernels.ops.registration import OPERATORS

NO_KERNEL = {"_unsafe_view", "alias", "lift_fresh"}
GATHERED = {("embedding", "weight"), ("index", "self"), ("index_select", "self")}
"""Arguments of which as many bytes are read as the operator writes."""
NOT_READ = {
    *(("nll_loss_forward", "self"), ("nll_loss_backward", "self")),
    *(("copy_", "self"), ("zero_", "self"), ("fill_", "self")),
}
"""Arguments of which only the shape or single elements are read."""
NOT_WRITTEN = {("_fused_sgd_", "grads")}
"""Arguments that torch's schema calls written, but that are written only with a scale of gradients."""
CONVOLUTION_READS = (("grad_output", "weight"), ("grad_output", "input"), ("grad_output",))
"""What each of the three results of a convolution's backward is computed from."""


@dataclass(frozen=True)
class Kernel:
    """What one operator asks of the device.

    Attributes:
        part: The part of the step.
        name: The operator.
        layer: The layer that FNGD's operator was called for, "" outside of them.
        algorithm: How a Gram matrix is formed, "" for everything else.
        macs: Multiply-adds by arithmetic.
        moved: Bytes of inputs and results, each moved once.
        scratch: Bytes of the operator's own scratch memory, as often as its launches write and read it.
        launches: Kernels launched.
        layers: How many layers FNGD's operator serves, in the row that its launches have.
    """

    part: str
    name: str
    layer: str
    algorithm: str
    macs: Counter[str]
    moved: int
    scratch: int = 0
    launches: int = 1
    layers: int = 0

    def floor(self, ceilings: Ceilings, *, scratch: bool) -> float:
        """Return the least seconds; `scratch` tells whether scratch memory goes through device memory."""
        products = tuple((macs, arithmetic) for arithmetic, macs in self.macs.items())
        return Work(products, self.moved + scratch * self.scratch).floor(ceilings)[0]


class KernelCounter(TorchDispatchMode):
    """Counts the kernels of what runs inside; FNGD's operators run on meta tensors, to see what they launch.

    Use it inside of FakeTensorMode, and of bench.gpu.meta.launching with its `launched`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._launches: list[dict[int, int]] = []
        self._part, self._of = "", Described("")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as this part of the step."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def launched(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """Take note of the launch of a Triton kernel."""
        self._launches.append(_by_storage([*arguments, *options.values()]))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace not in ("aten", "fngd"):
            return op(*args, **kwargs)
        # What torch composes of other operators: those are the kernels.
        with self:
            result = op.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = op(*args, **kwargs)
        name = op._schema.name.partition("::")[2]
        if op.namespace == "fngd":
            self._fngd(name, args, result)
        elif not op.is_view and name not in NO_KERNEL and "empty" not in name:
            self._aten(op, name, args, kwargs, result)
        return result

    def _add(self, name: str, macs: Counter[str], moved: int, *sizes: int) -> None:
        """Add a kernel; sizes: its scratch memory, launches and layers."""
        self.kernels.append(Kernel(self._part, name, self._of.layer, self._of.algorithm, macs, moved, *sizes))

    def _aten(self, op: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        bound = _bound(op, args, kwargs)
        if name == "convolution_backward":
            for i, reads in enumerate(CONVOLUTION_READS):
                if bound["output_mask"][i]:
                    mask = [i == other for other in range(3)]
                    macs = _macs(op, (*args[:-1], mask), kwargs, result)
                    self._add(name, macs, sum(_bytes(bound[read]) for read in reads) + _bytes(result[i]))
            return
        fresh = [return_.alias_info is None for return_ in op._schema.returns]
        results = result if isinstance(result, tuple) else (result,)
        written = sum(_bytes(x) for x, is_new in zip(results, fresh, strict=False) if is_new)
        moved = written
        only_shapes = name.startswith("new_") or name.endswith("_like")
        for argument in op._schema.arguments:
            key, value = (name, argument.name), bound.get(argument.name)
            if key in GATHERED:
                moved += written
            elif key not in NOT_READ and not only_shapes:
                moved += _bytes(value)
            if argument.alias_info is not None and argument.alias_info.is_write and key not in NOT_WRITTEN:
                moved += _bytes(value)
        self._add(name, _macs(op, args, kwargs, result), moved)

    def _fngd(self, name: str, inputs: Sequence[Any], result: Any) -> None:
        if name == "coefficients":
            layers, n, _ = inputs[0].shape
            with self.part("solve"):
                self._add(name, Counter(fp32=layers * n**3 // 6), _bytes(inputs) + _bytes(result))
            return
        if name in ("scale_bias", "found_non_finite"):  # Kernels of the extension.
            self._add(name, Counter(), _bytes(inputs) + _bytes(result))
            return
        before, first = (self._of, self._launches), len(self.kernels)
        describe = DESCRIPTIONS.get(name)
        self._of = Described(_shape(name, inputs)) if describe is None else describe(*inputs)
        self._launches = []
        try:
            with self.part(name.partition("_")[0]):
                with unset_fake_temporarily():
                    inputs = [meta(x) for x in inputs]
                    with self:
                        result = OPERATORS[name](*inputs)
                if self._launches and describe is None:
                    raise NotImplementedError(f"{name}: how many multiply-adds its Triton kernels do")
                self._add_launches(name, _by_storage([inputs, result]), self.kernels[first:])
        finally:
            self._of, self._launches = before

    def _add_launches(self, name: str, ends: dict[int, int], inside: list[Kernel]) -> None:
        """Add the Triton kernels of an operator as one: they do what torch's own kernels `inside` do not.

        ends: the storages of inputs and results
        """
        macs = Counter(self._of.macs) if self._launches else Counter()
        for kernel in inside:
            macs -= kernel.macs
        moved: dict[int, int] = {}
        scratch = 0
        for launch in self._launches:
            for storage, size in launch.items():
                if storage in ends:
                    moved[storage] = max(size, moved.get(storage, 0))
                else:
                    scratch += size
        self._add(name, macs, sum(moved.values()), scratch, len(self._launches), self._of.layers)


def _bound(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _bytes(value: Any) -> int:
    """Return the bytes of all different elements of some tensors."""
    return sum(
        x.itemsize * prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
        for x in _tensors(value)
    )


def _by_storage(values: Sequence[Any]) -> dict[int, int]:
    """Return the bytes of the largest of some tensors on each storage."""
    sizes: dict[int, int] = {}
    for x in _tensors(values):
        storage = x.untyped_storage()._cdata
        sizes[storage] = max(_bytes(x), sizes.get(storage, 0))
    return sizes


def _macs(op: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Counter[str]:
    if op._schema.name.startswith("aten::_scaled_dot_product"):
        bound = _bound(op, args, kwargs)
        shapes = [bound[key].shape for key in ("grad_out", "query", "key", "value") if key in bound]
        operations = (sdpa_flop_count if len(shapes) == 3 else sdpa_backward_flop_count)(*shapes)
        # Blocks above the diagonal are left out.
        operations //= 2 if bound.get("is_causal") else 1
    elif op.overloadpacket in flop_registry:
        operations = flop_registry[op.overloadpacket](*args, **kwargs, out_val=result)
    else:
        return Counter()
    return Counter({ARITHMETIC[_tensors(args)[0].dtype]: operations // 2})


def _shape(name: str, inputs: Sequence[Any]) -> str:
    sizes = "x".join(map(str, _tensors(inputs)[0].shape[1:]))
    return f"{name.partition('_')[2]} {sizes}"
