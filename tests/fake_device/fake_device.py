"""A CUDA device that is not there, for tests of a program that has never seen one.

    with FakeDevice() as fake:
        x = torch.ones(3, device="cuda")   # x.device is cuda:0, x.is_cuda
        x + torch.ones(3)                  # refused: two devices
        (x > 0).any().item()               # True; and fake.waits has one more: the host waited here

Tensors "on the device" are wrappers around CPU tensors. So values are real, a run gives the same bits as on the CPU,
and choices that depend on values are made. What a device would refuse is refused (`Refused`), and kept in `errors`, so
that it is told even where somebody catches it:

- work on tensors of two devices. CPU tensors without dimensions may take part in pointwise work, as in CUDA, and a copy
  may go from one device to the other;
- a CPU generator for numbers on the device; `.numpy()` of a tensor on it;
- work of one stream on what another may not have written yet, or that overwrites what another may still read
  (`fake_streams`), and memory that is freed while another stream uses it;
- the host reading memory that a copy from the device (non_blocking) may not have filled, or writing memory that a copy
  to the device still reads.

Whatever makes the host wait for the device is a `Wait`: values read (item, tolist, bool of a tensor, nonzero, boolean
indices), copies that are not of pinned memory and non_blocking, CPU tensors as indices, `synchronize` of what is not
over. Kernels themselves, their types and their memory are not simulated: what a real GPU cannot compute, this one can.

`torch.cuda`'s functions have stand-ins (`_cuda_functions`). Threads that begin inside see the device too. Backward
passes run in the thread that asks for them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from fake_streams import Event, Known, Memory, Stream, in_stream, learn
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
REPO = Path(__file__).resolve().parents[2]
# Folders whose code a wait is put down to.
SHOWN = tuple(f"{REPO / folder}/" for folder in ("packforcing", "nodes", "benchmarks"))

aten = torch.ops.aten
# The host must know a value, or how many there are.
READS_VALUES = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave", "aten::histc",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class Refused(Exception):
    """What a real device would refuse, or compute wrongly."""


@dataclass(frozen=True)
class Wait:
    """A place where the host waits until the device has come so far."""

    what: str  # the operation
    where: str  # "packforcing/generate/long_video.py:_check_finite"
    beside: bool  # whether another thread waited than the first one

    def __str__(self) -> str:
        return f"{self.where} ({self.what})"


class DeviceTensor(torch.Tensor):
    """A tensor on the device that is not there. To PyTorch's own code it is on the CPU, without data.

    Attributes:
        inner: the CPU tensor that has the values.
        memory: what it lies in; views share it.
    """

    inner: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CPU,
        )

    def __init__(self, inner: Tensor, memory: Memory) -> None:
        self.inner = inner
        self.memory = memory

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.memory.recorded.add(stream)

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return active().dispatch(func, args, kwargs or {})


_active: list[FakeDevice] = []


def active() -> FakeDevice:
    assert _active, "a tensor of a fake device outlived it"
    return _active[-1]


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """All tensors in arguments, lists of them included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Arguments or results with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [mapped(each, change) for each in value]
    if isinstance(value, tuple):
        changed = [mapped(each, change) for each in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    return value


@functools.cache
def written_arguments(func: Any) -> tuple[int | str, ...]:
    """Which arguments an operation writes into: positions and names."""
    arguments = [(i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return tuple(key for i, argument in arguments for key in (i, argument.name))


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operation only looks at memory in another way."""
    return bool(func.is_view)


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Threads(threading.local):
    """What each thread has for itself."""

    stream: Stream | None = None
    on_device = False  # whether tensors that PyTorch makes inside an operation belong to the device
    number = False  # whether the value that is copied is a Python number
    own = False  # whether the simulation itself is at work


class FakeDevice:
    """The device, while the context is open. At its end `errors` must be empty, or `Refused` is raised.

    Attributes:
        waits: where the host waited, in order.
        copies: how often what was copied, by direction.
        errors: what was refused.
        streams: all there are, the default one first.
    """

    def __init__(self, gigabytes: float = 80.0) -> None:
        self.bytes = int(gigabytes * 1e9)
        self.host: Known = {}
        self.main = Stream(self, "default")
        self.streams = [self.main]
        self.here = _Threads()
        self.waits: list[Wait] = []
        self.copies: Counter[str] = Counter()
        self.errors: list[str] = []
        self._host_memory: dict[int, tuple[StorageWeakRef, Memory]] = {}  # pinned
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FakeDevice:
        assert not _active, "one fake device at a time"
        _active.append(self)
        enter = self._stack.enter_context
        for owner, name, stand_in in _stand_ins(self):
            enter(patch.object(owner, name, stand_in))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        enter(torch.autograd.set_multithreading_enabled(False))
        enter(self.modes())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.close()
        _active.clear()
        if self.errors and kind is None:
            raise Refused(self.errors[0])

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """This thread sees the device."""
        with _Functions(self), _Operations(self):
            yield

    # ------------------------------------------------------------------ what the host waits for

    def refuse(self, reason: str) -> None:
        self.errors.append(f"{reason}, at {_place()}")
        raise Refused(self.errors[-1])

    def is_over(self, work: Known) -> bool:
        return all(self.host.get(stream, 0) >= number for stream, number in work.items())

    def wait_for(self, work: Known, what: str) -> None:
        """The host waits; that counts only where the work may not be over."""
        if not self.is_over(work):
            self._wait(work, what)

    def _wait(self, work: Known, what: str) -> None:
        beside = threading.current_thread() is not threading.main_thread()
        self.waits.append(Wait(what, _place(), beside))
        learn(self.host, work)

    def read_by_host(self, tensor: Tensor) -> None:
        """The host looks at a CPU tensor."""
        memory = self._pinned(tensor)
        if memory is not None:
            memory.check(self.host, "the host")

    # ------------------------------------------------------------------ work in streams

    def current_stream(self, device: Any = None) -> Stream:
        return self.here.stream or self.main

    def new_stream(self, device: Any = None, priority: int = 0) -> Stream:
        self.streams.append(Stream(self, f"side {len(self.streams)}"))
        return self.streams[-1]

    def launch(self, reads: list[Memory], writes: list[Memory]) -> Stream:
        """Queues work in the current stream."""
        stream = self.current_stream()
        learn(stream.known, self.host)
        stream.queued += 1
        known = stream.now()
        for memory in reads:
            memory.check(known, str(stream))
        for memory in writes:
            memory.check(known, str(stream), writes=True)
        for memory in reads:
            memory.used_by(stream, stream.queued, writes=False)
        for memory in writes:
            memory.used_by(stream, stream.queued, writes=True)
        return stream

    def allocated(self, inner: Tensor) -> DeviceTensor:
        """A tensor in memory of its own, which the current stream wrote."""
        memory = Memory(self, self.current_stream())
        memory.written = (self.current_stream(), self.current_stream().queued)
        return DeviceTensor(inner, memory)

    # ------------------------------------------------------------------ copies

    def sent(self, source: Tensor, to_device: bool, non_blocking: bool) -> Tensor:
        """A copy on the other device than the one that the source lies on."""
        return (self.to_device if to_device else self.to_host)(source, non_blocking)

    def to_device(self, source: Tensor, non_blocking: bool) -> DeviceTensor:
        """A copy of a CPU tensor."""
        self.here.own = True
        result = self.allocated(source.detach().clone())
        self.here.own = False
        self._copied_to_device(source, result.memory, non_blocking)
        return result

    def _copied_to_device(self, source: Tensor, target: Memory, non_blocking: bool) -> None:
        pinned = self._pinned(source)
        stream = self.launch([pinned] if pinned else [], [target])
        self.copies["to the device"] += 1
        if pinned is None or not non_blocking:
            kind = "ordinary memory" if pinned is None else "pinned memory, blocking"
            self._wait(stream.now(), f"copy to the device from {kind}")

    def to_host(self, source: DeviceTensor, non_blocking: bool) -> Tensor:
        """A copy on the CPU: in pinned memory if it is not waited for."""
        result = source.inner.detach().clone()
        self._copied_to_host(source, self.pin(result) if non_blocking else None, non_blocking)
        return result

    def _copied_to_host(self, source: DeviceTensor, target: Memory | None, non_blocking: bool) -> None:
        stream = self.launch([source.memory], [target] if target else [])
        self.copies["to the host"] += 1
        if target is None or not non_blocking:
            self._wait(stream.now(), "copy to the host")

    def pin(self, tensor: Tensor) -> Memory:
        """Makes a CPU tensor's memory pinned."""
        storage, memory = tensor.untyped_storage(), Memory(self, None)
        self._host_memory[storage._cdata] = StorageWeakRef(storage), memory
        return memory

    def _pinned(self, tensor: Tensor) -> Memory | None:
        """The pinned memory in which a CPU tensor lies, if it does."""
        if not self._host_memory or tensor.layout != torch.strided:
            return None
        reference, memory = self._host_memory.get(tensor.untyped_storage()._cdata, (None, None))
        return None if reference is None or reference.expired() else memory

    # ------------------------------------------------------------------ operations, below autograd

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Any operation."""
        if self.here.own:
            return func(*args, **kwargs)
        found = list(tensors_in(*args, *kwargs.values()))
        on_device = [tensor for tensor in found if isinstance(tensor, DeviceTensor)]
        if not on_device:
            return self._on_host(func, args, kwargs, found)
        name = func._schema.name
        if name == "aten::copy_":
            return self._copy(*args, **kwargs)
        if len(on_device) < len(found) or name in INDEXING:
            self._check_devices(func, found, args)
        result = self._on_device(func, args, kwargs, on_device)
        if name in READS_VALUES:
            self._wait(self.current_stream().now(), name.removeprefix("aten::"))
        return result

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any], found: list[Tensor]) -> Any:
        if found and self._host_memory and not is_view(func):
            written = {id(t) for t in tensors_in(*_chosen(func, args, kwargs))}
            for tensor in found:
                memory = self._pinned(tensor)
                if memory is not None:
                    memory.check(self.host, "the host", writes=id(tensor) in written)
        result = func(*args, **kwargs)
        if not found and self.here.on_device:  # PyTorch's own, in the midst of an operation
            return mapped(result, self.allocated)
        return result

    def _check_devices(self, func: Any, found: list[Tensor], args: Any = ()) -> None:
        others = [t for t in found if not isinstance(t, DeviceTensor) and t.device.type == "cpu"]
        if others and func._schema.name in INDEXING and not any(t is args[0] for t in others):
            # Indices and single values may lie on the CPU; they are sent, and the host waits for that.
            values = [t for t in tensors_in(*args[2:3]) if not isinstance(t, DeviceTensor) and t.dim()]
            if not values:
                self._wait(self.current_stream().now(), "indices on the CPU")
                others = []
        if torch.Tag.pointwise in func.tags or func._schema.name == "aten::fill_":
            # To CUDA one without dimensions is a number; but not one that is written into.
            written = {id(t) for t in tensors_in(*_chosen(func, args, {}))}
            others = [t for t in others if t.dim() or id(t) in written]
        if others:
            shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in found)
            self.refuse(f"{func} got tensors of two devices ({shapes})")
        if func._schema.name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(*args[1:2])):
            self._wait(self.current_stream().now(), "boolean indices")

    def _on_device(self, func: Any, args: Any, kwargs: dict[str, Any], on_device: list[DeviceTensor]) -> Any:
        if not is_view(func):
            written = {id(t) for t in tensors_in(*_chosen(func, args, kwargs))}
            self.launch(
                [t.memory for t in on_device if id(t) not in written], [t.memory for t in on_device if id(t) in written]
            )
        known = {id(t.inner): t for t in on_device}
        shared = {t.inner.untyped_storage()._cdata: t.memory for t in on_device}

        def outer(inner: Tensor) -> Tensor:
            if id(inner) in known:
                return known[id(inner)]
            if inner.is_conj() or inner.is_neg():  # the wrapper would not show it
                inner = inner.resolve_conj().resolve_neg()
            memory = shared.get(inner.untyped_storage()._cdata)
            return self.allocated(inner) if memory is None else DeviceTensor(inner, memory)

        return mapped(func(*mapped(args, on_host), **{k: mapped(v, on_host) for k, v in kwargs.items()}), outer)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """`target.copy_(source)`, of which one at least is on the device."""
        both = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
        if all(both):
            self.launch([source.memory], [target.memory])
        elif both[1]:
            self._copied_to_host(source, self._pinned(target), non_blocking)
        elif not self.here.number:
            self._copied_to_device(source, target.memory, non_blocking)
        on_host(target).copy_(on_host(source))
        return target


def on_host(tensor: Any) -> Any:
    """The values of a tensor, without a copy that would count; anything else as it is."""
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor


def _chosen(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes into."""
    keys = written_arguments(func)
    return [args[key] if isinstance(key, int) else kwargs[key] for key in keys if _has(args, kwargs, key)]


def _has(args: Any, kwargs: dict[str, Any], key: int | str) -> bool:
    return key < len(args) if isinstance(key, int) else key in kwargs


def _place() -> str:
    """The innermost function of the project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SHOWN):
            return f"{Path(frame.f_code.co_filename).relative_to(REPO)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


class _Operations(TorchDispatchMode):
    """Sees the operations on CPU tensors as well."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the detour is made for each operation

    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._fake.dispatch(func, args, kwargs or {})


# ---------------------------------------------------------------------- functions, above autograd


class _Crossing(torch.autograd.Function):
    """A copy from one device to the other, through which gradients flow back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fake: FakeDevice, to_device: bool, non_blocking: bool) -> Tensor:
        ctx.fake, ctx.to_device = fake, to_device
        return fake.sent(x, to_device, non_blocking)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.fake.sent(grad, not ctx.to_device, False), None, None, None


class _Functions(TorchFunctionMode):
    """Sees every call of PyTorch from Python: those that name the device are answered here."""

    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self._fake = fake
        methods = {
            "to": self._to, "cuda": self._cuda, "cpu": self._cpu, "tolist": self._tolist, "numpy": self._numpy,
            "__array__": self._numpy, "pin_memory": self._pin_memory, "is_pinned": self._is_pinned,
            "__setitem__": self._setitem, "data_ptr": self._data_ptr,
        }  # fmt: skip
        self._handlers = {getattr(torch.Tensor, name): handler for name, handler in methods.items()}
        self._handlers[torch.Tensor.data.__set__] = self._set_data
        self._handlers[torch.as_tensor] = self._as_tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if kwargs.get("device") is not None or kwargs.get("pin_memory"):
            return self._factory(func, args, dict(kwargs))
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        here = self._fake.here
        before, here.on_device = (
            here.on_device,
            any(isinstance(t, DeviceTensor) for t in tensors_in(*args, *kwargs.values())),
        )
        try:
            self._check_generator(kwargs.get("generator"), here.on_device)
            return func(*args, **kwargs)
        finally:
            here.on_device = before

    def _check_generator(self, generator: Any, on_device: bool) -> None:
        if generator is not None and is_cuda(generator.device) != on_device:
            self._fake.refuse(f"a generator of {generator.device} for numbers on {CUDA if on_device else CPU}")

    def _factory(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call with `device` or `pin_memory`."""
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        if device is not None and torch.device(device).type not in ("cpu", "cuda"):
            return func(*args, **kwargs, device=device)
        wanted = is_cuda(device)
        self._check_generator(kwargs.get("generator"), wanted)
        plain = mapped(args, on_host) if device is not None else args
        made = func(*plain, **kwargs, **({} if device is None else {"device": CPU}))
        if pinned:
            self._fake.pin(made)
        if not wanted:
            return made
        if func is torch.tensor:  # built on the host and sent
            return self._fake.to_device(made, non_blocking=False)
        requires_grad = kwargs.get("requires_grad", False)
        self._fake.launch([], [])
        return mapped(made, lambda t: self._fake.allocated(t.detach()).requires_grad_(requires_grad))

    def _as_tensor(self, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        made = data if isinstance(data, Tensor) else torch.as_tensor(data, dtype=dtype)
        return self._to(made, device or made.device, dtype or made.dtype)

    # -- from one device to another

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy, other = kwargs.pop("copy", False), args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor):
            device, dtype, non_blocking, layout = other.device, other.dtype, kwargs.get("non_blocking", False), None
        else:
            if len(args) > 1 and isinstance(args[-1], bool):  # to(device, dtype, non_blocking)
                kwargs["non_blocking"], args = args[-1], args[:-1]
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        return self._moved(x, device or x.device, dtype or x.dtype, bool(non_blocking), copy, layout)

    def _moved(
        self, x: Tensor, device: torch.device, dtype: torch.dtype, non_blocking: bool, copy: bool, layout: Any
    ) -> Tensor:
        there, here = is_cuda(device), isinstance(x, DeviceTensor)
        options = {} if layout is None else {"memory_format": layout}
        if there == here:
            if here:
                return self._call(torch.Tensor.to, (x, dtype), {"copy": copy, **options})
            return torch.Tensor.to(x, device, dtype, non_blocking, copy, **options)
        if x.device.type == "meta":
            self._fake.refuse("a tensor without data is copied")
        if here:  # types are converted where the tensor lies, as PyTorch does
            x = self._call(torch.Tensor.to, (x, dtype), options)
            return self._crossing(x, False, non_blocking)
        if non_blocking and dtype != x.dtype and self._fake._pinned(x) is not None:
            non_blocking = False  # what is sent is a converted copy in ordinary memory
        return self._crossing(torch.Tensor.to(x, dtype, **options), True, non_blocking)

    def _crossing(self, x: Tensor, to_device: bool, non_blocking: bool) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return _Crossing.apply(x, self._fake, to_device, non_blocking)
        return self._fake.sent(x.detach(), to_device, non_blocking)

    def _cuda(self, x: Tensor, device: Any = None, non_blocking: bool = False) -> Tensor:
        return self._moved(x, CUDA, x.dtype, non_blocking, False, None)

    def _cpu(self, x: Tensor) -> Tensor:
        return self._moved(x, CPU, x.dtype, False, False, None)

    # -- what the host sees

    def _tolist(self, x: Tensor) -> Any:
        return self._seen(x).tolist()

    def _seen(self, x: Tensor) -> Tensor:
        if isinstance(x, DeviceTensor):
            return self._fake.to_host(x, False)
        self._fake.read_by_host(x)
        return x

    def _numpy(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, DeviceTensor):
            self._fake.refuse("numpy takes no tensor of a device")
        return self._seen(x).numpy(**kwargs)

    def _data_ptr(self, x: Tensor) -> int:
        return on_host(x).data_ptr()

    # -- memory

    def _pin_memory(self, x: Tensor, device: Any = None) -> Tensor:
        if isinstance(x, DeviceTensor):
            self._fake.refuse("only CPU memory can be pinned")
        if self._fake._pinned(x) is not None:
            return x
        pinned = x.detach().clone(memory_format=torch.contiguous_format)
        self._fake.pin(pinned)
        return pinned

    def _is_pinned(self, x: Tensor, device: Any = None) -> bool:
        return not isinstance(x, DeviceTensor) and self._fake._pinned(x) is not None

    def _set_data(self, x: Tensor, value: Tensor) -> None:
        if isinstance(x, DeviceTensor) != isinstance(value, DeviceTensor):
            self._fake.refuse("`data` is set to that of another device")
        torch.Tensor.data.__set__(x, value)
        if isinstance(x, DeviceTensor):
            x.inner, x.memory = value.inner, value.memory

    def _setitem(self, x: Tensor, key: Any, value: Any) -> None:
        here = self._fake.here
        before, here.number = here.number, not isinstance(value, Tensor)
        try:
            self._call(torch.Tensor.__setitem__, (x, key, value), {})
        finally:
            here.number = before


# ---------------------------------------------------------------------- torch.cuda


def _stand_ins(fake: FakeDevice) -> list[tuple[Any, str, Any]]:
    """What is replaced while the device is there: owner, name, stand-in."""
    run = threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with fake.modes():
            run(thread)

    backward = torch.autograd.graph._engine_run_backward

    def backward_with_device(*args: Any, **kwargs: Any) -> Any:
        with _Functions(fake):  # it was put aside for the call of backward(), say
            return backward(*args, **kwargs)

    class Generator(torch.Generator):
        """On the CPU; `device` says where its numbers are wanted."""

        def __new__(cls, device: Any = "cpu") -> Generator:
            made = super().__new__(cls)
            made.where = CUDA if is_cuda(device) else CPU
            return made

        device = property(lambda self: self.where)

    other = [
        (threading.Thread, "run", run_with_device),
        (torch.autograd, "_engine_run_backward", backward_with_device),
        (torch, "Generator", Generator),
    ]
    return other + [(torch.cuda, name, stand_in) for name, stand_in in _cuda_functions(fake).items()]


def _cuda_functions(fake: FakeDevice) -> dict[str, Any]:
    """Stand-ins for functions and classes of `torch.cuda`."""

    def synchronize(device: Any = None) -> None:
        fake.wait_for({stream: stream.queued for stream in fake.streams}, "synchronize()")

    properties = SimpleNamespace(name="Fake GPU", total_memory=fake.bytes, major=9, minor=0, multi_processor_count=132)
    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    none_held: Callable[..., int] = lambda *args, **kwargs: 0  # noqa: E731
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": lambda device: contextlib.nullcontext(),
        "Stream": fake.new_stream,
        "Event": functools.partial(Event, fake),
        "stream": functools.partial(in_stream, fake),
        "current_stream": fake.current_stream,
        "default_stream": lambda device=None: fake.main,
        "synchronize": synchronize,
        "empty_cache": nothing,
        "mem_get_info": lambda device=None: (fake.bytes, fake.bytes),
        "memory_allocated": none_held,
        "memory_reserved": none_held,
        "max_memory_allocated": none_held,
        "max_memory_reserved": none_held,
        "reset_peak_memory_stats": nothing,
        "set_per_process_memory_fraction": nothing,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
    }
