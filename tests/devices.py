"""A device that is not there: Apple's `mps`, which has no float64 and lacks some operations.

    with apple():
        x = torch.randn(3, device="mps")   # its values lie on the CPU, but x.device is mps
        net = net.to("mps")
        net(x).sum().backward()
        x.double()                         # TypeError, as on a Mac
        x + torch.ones(3)                  # RuntimeError: a tensor of the CPU beside one of mps

It refuses what a Mac refuses: float64, operations without a kernel there (`LACKS`), tensors of two
devices in one operation. It is stricter in one point: a single float64 number of the CPU is not
taken either. It says nothing about speed or precision. `apple(waits)` also appends to that list
the name of each operation that waits for the device: a copy from it, a number that is asked for.
"""
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LACKS = {"aten::special_ndtri"}
MPS, CPU, aten = torch.device("mps", 0), torch.device("cpu"), torch.ops.aten
TWICE = (torch.float64, torch.complex128)
TAKES_BOTH = {  # the index, or what is copied, may lie on the CPU
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default,
    aten.index_put_.default, aten._index_put_impl_.default}


class OnApple(torch.Tensor):
    "A tensor that says it is on mps; its values are those of `held`, on the CPU."
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: MPS)
    is_cpu, is_mps, is_cuda = False, True, False

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="cpu")

    def __init__(self, held): self.held = held
    def __repr__(self): return f"{self.held!r} on mps"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with _Operations(): return func(*args, **(kwargs or {}))


def held(v): return v.held if isinstance(v, OnApple) else v
def there(v): return isinstance(v, OnApple)
def is_mps(device): return device is not None and torch.device(device).type == "mps"


class _Operations(TorchDispatchMode):
    "Computes on the CPU what is asked of mps, and refuses what mps does not have."
    def __init__(self, waits=None):
        super().__init__()
        self.waits = [] if waits is None else waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        asked, name = kwargs.get("device"), func._schema.name
        from_mps = any(map(there, tensors))
        to_mps = from_mps if asked is None else is_mps(asked)
        if from_mps: self.refuse(func, name, tensors)
        if asked is not None: kwargs["device"] = CPU
        out = func(*tree_map(held, args), **tree_map(held, kwargs))
        copied_back = func is aten.copy_.default and not there(args[0])
        if not to_mps or func is aten._local_scalar_dense.default or copied_back:
            if from_mps: self.waits.append(name)
            return args[0] if copied_back else out
        if any(isinstance(v, torch.Tensor) and v.dtype in TWICE for v in tree_leaves(out)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                            "doesn't support float64. Please use float32 instead.")
        same = {id(held(v)): v for v in tensors if there(v)}  # in place: gives its own argument
        def on_mps(v):
            if not isinstance(v, torch.Tensor): return v
            return same[id(v)] if id(v) in same else OnApple(v)
        return tree_map(on_mps, out)

    def refuse(self, func, name, tensors):
        if name in LACKS: raise NotImplementedError(
            f"The operator '{name}' is not currently implemented for the MPS device")
        strangers = [v for v in tensors if not there(v) and (v.ndim or v.dtype in TWICE)]
        if strangers and func not in TAKES_BOTH: raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two "
            "devices, mps:0 and cpu!")


class _Moves(TorchFunctionMode):
    "`to` and its kin, which PyTorch refuses before any operation is reached: there is no Mac."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cpu: return self.moved(args[0], CPU)
        if func in (torch.Tensor.to, torch.Tensor.type_as): return self.to(*args, **kwargs)
        if func is torch.Tensor.pin_memory: return args[0]
        if func is torch.Tensor.tolist: return func(self.moved(args[0], CPU))
        if func is torch.Tensor.numpy and there(args[0]): raise TypeError(
            "can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return func(*args, **kwargs)

    def to(self, x, *args, other=None, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor): other, args = args[0], args[1:]
        device, dtype = (other.device, other.dtype) if other is not None else \
            torch._C._nn._parse_to(*args, **kwargs)[:2]
        return self.moved(x, device or x.device, dtype, copy, kwargs.get("memory_format"))

    def moved(self, x, device, dtype=None, copy=False, memory_format=None):
        stays = is_mps(device) == there(x) and dtype in (None, x.dtype)
        if stays and not copy and memory_format is None: return x
        return aten._to_copy(x, dtype=dtype, device=device, memory_format=memory_format)


@contextmanager
def apple(waits=None):
    "Within, `mps` is a device, with what a Mac's has and lacks."
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Moves(), _Operations(waits): yield
    finally: torch.__future__.set_overwrite_module_params_on_conversion(before)
